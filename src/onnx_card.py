"""What an export says of itself: names and explanations inside the graph, and a README.md with an example to run."""

import re
from collections import Counter
from string import Template

from src.onnx_graph import VALUES

PROPERTIES = "family", "vocab_size", "context", "license"  # facts that the graph itself holds too
ENCODINGS = {  # kind of tokenizer -> its package, and how the example reads and uses it
    "sentencepiece": (
        "sentencepiece",
        'tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))\n'
        "encode, decode = tokenizer.encode, tokenizer.decode",
    ),
    "hf": (
        "tokenizers",
        'tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))\n'
        "tokenizer.no_truncation()\n"
        "tokenizer.encode_special_tokens = True  # a text that names a special token does not become one\n"
        "encode, decode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids, tokenizer.decode",
    ),
    "byte": (
        "",
        "encode = lambda text: list(text.encode())  # one token a byte\n"
        'decode = lambda ids: bytes(i for i in ids if i < 256).decode(errors="replace")',
    ),
}
SESSION = """options = onnxruntime.SessionOptions()
options.add_session_config_entry("session.disable_quant_qdq", "1")  # decodes the int8 weights once, not at every call
session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options)"""
README = Template("""# $name

A language model of the family `$family`, with $vocab_size tokens and a context of $context, as an ONNX graph
($precision, opset $opset), exported by Generative TRM. Operators that are not ONNX's own: $contrib.$license

## Run it

```
pip install numpy onnxruntime $package
python example.py FOLDER "Once upon a time" 100
```

`example.py` continues a text by up to 100 tokens, always the likeliest:

```python
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
$imports
folder, prompt, most = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
facts = json.loads((folder / "onnx.json").read_text())
$tokenizer
$session
slots = [entry for entry in session.get_inputs() if entry.name.startswith("past_")]  # none in a graph without a cache
empty = {s.name: np.zeros((1, s.shape[1], facts["context"], s.shape[3]), np.float32) for s in slots}

ids = encode(prompt)
start = [facts["bos_id"]] + ids if facts["add_bos"] or not ids else ids
made, text, past, new = [], start, empty, start  # `text` is in the context, `new` the part that the cache lacks
while len(made) < most:
    where = {"last": np.int32([len(text) - 1]), "total": np.int32([len(text)]), "read": np.int64([len(new) - 1])}
    logits, *present = session.run(None, {"input_ids": np.int64([new])} | where | past)
    token = int(logits[0].argmax())
    if token in facts["end_ids"]:
        break
    made, text = made + [token], text + [token]
    past, new = dict(zip(past, present)), [token] if past else text
    if len(text) > facts["context"]:  # keeps the last half, and reads it again
        text = text[-(facts["context"] // 2) :]
        past, new = empty, text
print(prompt + decode(start + made)[len(decode(start)) :])
```

The graph explains its inputs and outputs itself, as doc strings (Netron shows them). A call either begins every row, or
adds one token to each. Rows of a first call may differ in length: each stands at the left, and `last` tells its end.
""")


def describe(proto, facts: dict):
    """Put names and explanations into a graph (onnx.ModelProto), in the place of the exporter's notes, which hold
    paths of its machine.  A node is named after its place in the model and counted there, as visits repeat it."""
    from onnx.helper import set_model_props

    graph, counts, names = proto.graph, Counter(), {}
    for node in graph.node:
        scopes = [re.findall(r"'([^']*)'", e.value) for e in node.metadata_props if e.key.endswith("name_scopes")]
        place = scopes[0][-2].removeprefix("model.") if scopes and len(scopes[0]) > 1 else ""
        place = node.op_type if place.startswith("_") or not place else f"{place}/{node.op_type}"
        counts[place] += 1
        node.name = f"{place}_{counts[place]}"
    _strip(proto)
    ends = [*graph.input, *graph.output]
    for value in ends:
        dims, value.doc_string = VALUES[re.sub(r"_\d+$", "", value.name)]
        names |= {dim.dim_param: name for dim, name in zip(value.type.tensor_type.shape.dim, dims.split())}
    for value in (*ends, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = re.sub(r"\w+", lambda word: names.get(word[0], word[0]), dim.dim_param)
    graph.name = "generative_trm"
    proto.doc_string = "A language model, exported by Generative TRM; README.md beside it has an example."
    set_model_props(proto, {name: str(facts[name]) for name in PROPERTIES if facts.get(name)})


def _strip(message):
    for field, value in message.ListFields():
        if field.name in ("metadata_props", "doc_string"):
            message.ClearField(field.name)
        elif field.message_type is not None:
            for part in [value] if hasattr(value, "ListFields") else value:
                _strip(part)


def contrib_operators(proto) -> list[str]:
    """The operators of a graph that are not ONNX's own, sorted."""
    return sorted({node.op_type for node in proto.graph.node if node.domain not in ("", "ai.onnx")})


def readme(folder_name: str, facts: dict) -> str:
    """README.md of an export folder; `facts` are those of its onnx.json."""
    package, tokenizer = ENCODINGS[facts["tokenizer"]]
    operators = ", ".join(facts["contrib_ops"])
    is_decoded = facts["precision"] == "int8" and not facts["contrib_ops"]
    return README.substitute(
        facts,
        name=folder_name,
        package=package,
        imports=f"import {package}\n" if package else "",
        tokenizer=tokenizer,
        session=SESSION if is_decoded else SESSION.splitlines()[-1].replace(", options", ""),
        license=f" Licence: {facts['license']}." if facts.get("license") else "",
        contrib=f"{operators} (com.microsoft, of ONNX Runtime)" if operators else "none",
    )
