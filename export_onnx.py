"""Export a checkpoint to an ONNX folder: graph, settings and tokenizer. Running it needs no PyTorch and no checkpoint.

    python export_onnx.py --output onnx/python                    # the released checkpoint
    python export_onnx.py runs/trm --output onnx/trm --quantize int8
    python export_onnx.py runs/trm --output onnx/deep --max_recursion_depth 4
    python export_onnx.py runs/trm --output onnx/gpu --device cuda
    python export_onnx.py runs/trm --output onnx/plain --contrib_ops false    # for runtimes other than ONNX Runtime
    python generate.py --onnx onnx/trm --prompt "def main("

Before the folder is put in place, the graph is compared with the model. Two things must agree: the logits of padded
rows, both in one call and token by token, and greedy text that is longer than the context. The folder's README.md has
an example that runs the graph without this project. The script prints facts about the graph on stdout, as one JSON
line. Exporting takes one or two seconds per block that a token passes (visits x layers), because the graph contains
every visit. Weights that several visits share are stored once.

Needs: pip install onnx==1.23.2 onnxruntime==1.31.1 onnxscript==0.7.2
"""

import json
import sys

from src.config import before_torch, parse_flags, run
from src.onnx.config import OnnxExport


@before_torch
def parse_args(argv=None) -> OnnxExport:
    return parse_flags(__doc__, OnnxExport, argv=argv, positional="checkpoint")[0]


from src.onnx.export import export_onnx


def describe(settings: OnnxExport, facts: dict) -> str:
    """Returns a summary of the export for the terminal."""
    errors = facts["errors"]
    lines = [
        f"{settings.output}: opset {facts['opset']}, {facts['precision']}, {facts['attention']} attention, "
        f"{'with' if facts['cache'] else 'without'} cache, {facts['bytes'] / 2**20:.1f} MiB",
        "operators outside the ONNX standard: "
        + (f"{', '.join(facts['contrib_ops'])} (--contrib_ops false avoids them)" if facts["contrib_ops"] else "none"),
        f"checked against torch: logits differ by at most {errors['logits']:.1g}, greedy text is identical",
    ]
    if "int8" in errors:
        e = errors["int8"]
        lines.append(
            f"int8 against fp32, on text that the model generated: rms error of the logits {e['rms']:.3g} (their "
            f"standard deviation is {e['deviation']:.3g}), same most likely token {e['same_likeliest']:.1%}, "
            f"loss +{e['nats']:.2g} nats per token"
        )
    return "\n".join(lines)


def main(argv=None):
    settings = parse_args(argv)
    facts = export_onnx(settings)
    print(describe(settings, facts), file=sys.stderr)
    print(json.dumps(facts))


if __name__ == "__main__":
    run(main)
