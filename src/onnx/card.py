"""Documentation of an export: names and doc strings inside the graph, and a README.md with a runnable example."""

import re
from collections import Counter
from pathlib import Path
from string import Template

import yaml

PROPERTIES = "family", "vocab_size", "context", "license"  # facts that are also stored in the graph
TEMPLATES = Path(__file__).with_name("templates")


def describe(proto, facts: dict):
    """Write names and doc strings into a graph (onnx.ModelProto).

    They replace the exporter's metadata, which contains file paths of the exporting machine. A node is named after its
    module, plus a counter because a looped module appears once per visit."""
    from onnx.helper import set_model_props

    graph, counts = proto.graph, Counter()
    for node in graph.node:
        scopes = [re.findall(r"'([^']*)'", e.value) for e in node.metadata_props if e.key.endswith("name_scopes")]
        place = scopes[0][-2].removeprefix("model.") if scopes and len(scopes[0]) > 1 else ""
        place = node.op_type if place.startswith("_") or not place else f"{place}/{node.op_type}"
        counts[place] += 1
        node.name = f"{place}_{counts[place]}"
    _strip(proto)
    explained = yaml.safe_load((TEMPLATES / "values.yaml").read_text(encoding="utf-8"))
    for value in (*graph.input, *graph.output):
        value.doc_string = explained[re.sub(r"_\d+$", "", value.name)]
    graph.name = "generative_trm"
    proto.doc_string = "A language model, exported by Generative TRM; README.md beside it has an example."
    set_model_props(proto, {name: str(facts[name]) for name in PROPERTIES if facts.get(name)})


def _strip(message):
    """Removes metadata and doc strings from a protobuf message and all its parts."""
    for field, value in message.ListFields():
        if field.name in ("metadata_props", "doc_string"):
            message.ClearField(field.name)
        elif field.message_type is not None:
            for part in [value] if hasattr(value, "ListFields") else value:
                _strip(part)


def contrib_operators(proto) -> list[str]:
    """Returns the sorted names of the operators outside the ONNX standard."""
    return sorted({node.op_type for node in proto.graph.node if node.domain not in ("", "ai.onnx")})


def readme(folder_name: str, facts: dict) -> str:
    """Returns the text of an export folder's README.md; `facts` is the content of its onnx.json."""
    template, pieces = ((TEMPLATES / name).read_text(encoding="utf-8") for name in ("readme.md", "example.yaml"))
    pieces = yaml.safe_load(pieces)
    tokenizer = pieces["tokenizers"][facts["tokenizer"]]
    dequantizes = facts["precision"] == "int8" and not facts["contrib_ops"]
    operators = ", ".join(facts["contrib_ops"])
    bos = '[facts["bos_id"]]'
    more = {
        "name": folder_name,
        "license": f"\nLicense: {facts['license']}." if facts.get("license") else "",
        "contrib": f"{operators} (com.microsoft, of ONNX Runtime)" if operators else "none",
        "session": pieces["sessions"]["dequantizes" if dequantizes else "plain"],
        # a model that was trained without BOS still needs some first token if the prompt is empty
        "start": f"{bos} + {tokenizer['encode']}" if facts["add_bos"] else f"{tokenizer['encode']} or {bos}",
    }
    return Template(template).substitute(facts | tokenizer | more)
