"""Show what PyTorch offers on this machine, and which device, precision and compilation training would choose.

    python checkTorch.py                    # takes about five seconds
    python checkTorch.py --device cpu       # check the CPU, even if there is a GPU
    python checkTorch.py --json             # print one JSON object

Prints the versions, the devices, the C++ compiler, and the choices of train_trm_lm.py with their reasons. Then it
multiplies square matrices on the chosen device in each precision, and prints the speed in GFLOP/s and the relative
error against float64. It writes no files. The exit code is 1 if the products are wrong in the chosen precision.
"""

import json
import platform
import sys
import time
from dataclasses import dataclass

from src.config import before_torch, parse_flags, run
from src.errors import UserError

# Largest relative error (Frobenius norm) that rounding explains. The inputs are exact and the sums are accumulated in
# a wider format, so only the result is rounded: by 2^-9 for bf16, 2^-12 for fp16. fp32 may run as TF32 on a GPU.
TOLERANCE = {"fp32": 2e-3, "bf16": 6e-3, "fp16": 2e-3}


@dataclass
class CheckConfig:
    """What to check.

    Args:
        device: device to check: auto (CUDA, else MPS, else CPU), cpu, cuda, cuda:1, ..., or mps
        seconds: total time to spend on matrix products
        json: print one JSON object instead of text
    """

    device: str = "auto"
    seconds: float = 4.0
    json: bool = False


@before_torch
def parse_args(argv=None) -> CheckConfig:
    (args,) = parse_flags(__doc__, CheckConfig, argv=argv)
    if not args.seconds > 0:
        raise UserError(f"--seconds {args.seconds}: set it above 0")
    return args


import torch

from src.runtime import (
    DTYPES,
    choose_compile,
    choose_device,
    choose_precision,
    cpu_features,
    describe,
    find_compiler,
    synchronize,
)


def matmul_check(device: torch.device, precision: str, seconds: float) -> dict:
    """Multiply square matrices for about `seconds` s, in sizes that grow as long as time allows.

    Returns {size, gflops, relative_error, correct}, or {error} if the device does not support the precision."""
    dtype, generator = DTYPES[precision], torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 256, generator=generator).to(dtype) for _ in range(2))
    try:
        exact = a.double() @ b.double()
        error = ((a.to(device) @ b.to(device)).cpu().double() - exact).norm() / exact.norm()
        size = 256
        elapsed = _time_matmul(device, dtype, size, 1)
        # twice the size is 8 times the work, done twice because _time_matmul warms up: 16 times the time
        while size < 8192 and 16 * elapsed < seconds / 4:
            size *= 2
            elapsed = _time_matmul(device, dtype, size, 1)
        repeats = max(1, round(seconds / 3 / max(elapsed, 1e-6)))
        elapsed = _time_matmul(device, dtype, size, repeats)
    except RuntimeError as refusal:
        return {"error": str(refusal).splitlines()[0]}
    correct = bool(error < TOLERANCE[precision])
    return {"size": size, "gflops": 2 * size**3 / elapsed / 1e9, "relative_error": error.item(), "correct": correct}


def _time_matmul(device, dtype, size, repeats) -> float:
    """Returns the mean time of one size x size product in seconds, over `repeats` products after a warm-up."""
    a, b = torch.randn(size, size, device=device).to(dtype), torch.randn(size, size, device=device).to(dtype)
    a @ b
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        a @ b
    synchronize(device)
    return (time.perf_counter() - start) / repeats


def report(args: CheckConfig) -> dict:
    """Returns everything that is printed, as one dict; its keys are those of --json."""
    device = choose_device(args.device)
    devices = {f"cuda:{i}": describe(torch.device("cuda", i)) for i in range(torch.cuda.device_count())}
    if torch.backends.mps.is_available():
        devices["mps"] = describe(torch.device("mps"))
    devices["cpu"] = describe(torch.device("cpu"))
    precision, compiled = choose_precision("auto", device), choose_compile(None, device)
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "devices": devices,
        "cpu_features": cpu_features(),
        "compiler": find_compiler(),
        "device": str(device),
        "precision": precision.value,
        "precision_reason": precision.reason,
        "compile": compiled.value,
        "compile_reason": compiled.reason,
        "matmul": {name: matmul_check(device, name, args.seconds / len(DTYPES)) for name in DTYPES},
    }


def show(facts: dict) -> None:
    """Print the report as text."""
    print(f"torch      {facts['torch']}, python {facts['python']}, {facts['system']}")
    for name, text in facts["devices"].items():
        print(f"{name:10} {text}")
    print(f"compiler   {facts['compiler'] or 'none found'}")
    print("\ntraining would choose")
    print(f"  device     {facts['device']}")
    print(f"  precision  {facts['precision']} ({facts['precision_reason']})")
    print(f"  compile    {str(facts['compile']).lower()} ({facts['compile_reason']})")
    print(f"\nmatrix products on {facts['device']}")
    for name, result in facts["matmul"].items():
        if "error" in result:
            print(f"  {name}  not supported here: {result['error']}")
            continue
        verdict = "correct" if result["correct"] else "WRONG"
        speed = f"{result['gflops']:9,.1f} GFLOP/s at {result['size']} cubed"
        print(f"  {name} {speed}, relative error {result['relative_error']:.1e}: {verdict}")


def main(argv=None) -> int:
    args = parse_args(argv)
    facts = report(args)
    print(json.dumps(facts, indent=2)) if args.json else show(facts)
    wrong = [name for name, result in facts["matmul"].items() if result.get("correct") is False]
    if wrong:
        print(f"warning: wrong products in {', '.join(wrong)}: do not train in this precision", file=sys.stderr)
    return 1 if facts["precision"] in wrong else 0


if __name__ == "__main__":
    run(main)
