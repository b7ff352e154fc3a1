"""The one place of device logic: which device, precision and compiler a run uses, and why (CUDA, MPS, CPU)."""

import contextlib
import ctypes
import importlib.util
import math
import os
import shutil
import signal
import sys
import sysconfig
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from src.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
GIB = 1024**3
COMPILE_S = 40  # what compiling takes on two cores, the first time
COMPILE_FROM_S = 120  # a compiled step takes two thirds of an eager one, so that this much training earns it
USUAL_FLOPS = {"cpu": 1e11, "cuda": 2e13, "mps": 1e12}  # a second, by which a run's time is guessed before it begins
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # of malloc.h


class Choice(NamedTuple):
    """A setting chosen for the user, and the reason to tell; unpacks as (value, reason)."""

    value: str | bool
    reason: str


def choose_device(wanted: str = "auto") -> torch.device:
    """auto = CUDA, else MPS, else CPU.  Raises UserError for a device that is unknown or not here."""
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind, _, index = wanted.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (index and not (kind == "cuda" and index.isdecimal())):
        raise UserError(f"--device {wanted}: unknown; choose auto, cpu, cuda, cuda:N or mps")
    if kind == "cuda":
        _need_cuda(wanted, int(index or 0))
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"--device mps: torch {torch.__version__} sees no Apple GPU here; use --device cpu or auto")
    return torch.device(wanted)


def _need_cuda(wanted, index):
    if not torch.cuda.is_available():
        without = torch.version.cuda is None and torch.version.hip is None
        built = "built without CUDA" if without else "built for CUDA, but sees no usable GPU or driver"
        advice = "install a CUDA build of torch, or use" if without else "check nvidia-smi, or use"
        raise UserError(f"--device {wanted}: torch {torch.__version__} is {built}; {advice} --device cpu")
    count = torch.cuda.device_count()
    if index >= count:
        have = "cuda:0 only" if count == 1 else f"cuda:0 to cuda:{count - 1}"
        raise UserError(f"--device {wanted}: there is no such GPU; this machine has {have}")


def cpu_features() -> list[str]:
    """Which of AVX2, AVX512, AVX512-BF16 and AMX-BF16 this CPU has."""
    names = {"avx2": "AVX2", "avx512_f": "AVX512", "avx512_bf16": "AVX512-BF16", "amx_bf16": "AMX-BF16"}
    found = torch.cpu.get_capabilities()
    return [name for key, name in names.items() if found.get(key)]


def choose_precision(wanted: str, device: torch.device) -> Choice:
    """(fp32 | bf16 | fp16, reason).  auto takes the fastest that the device has in hardware.

    torch can run bf16 without hardware for it, only slower, so a wanted bf16 is obeyed; fp16 on a CPU is refused."""
    best = _best_precision(device)
    if wanted == "auto":
        return best
    if wanted not in DTYPES:
        raise UserError(f"--precision {wanted}: unknown; choose auto, {', '.join(DTYPES)}")
    if wanted == "fp16" and device.type == "cpu":
        raise UserError("--precision fp16 is for GPUs: on a CPU choose bf16, fp32 or auto")
    slow = wanted == "bf16" and best.value != "bf16" and device.type != "mps"
    return Choice(wanted, "as asked; there is no bf16 hardware here, so expect it to be slow" if slow else "as asked")


def _best_precision(device) -> Choice:
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if (major, minor) >= (8, 0):
            return Choice("bf16", f"bf16 hardware, sm{major}{minor}")
        return Choice("fp16", f"with loss scaling, as sm{major}{minor} is before bf16 (sm80)")
    if device.type == "mps":
        return Choice("fp32", "autocast gains little on MPS; bf16 and fp16 only when asked for")
    hardware = [name for name in ("AMX-BF16", "AVX512-BF16") if name in cpu_features()]
    if hardware:
        return Choice("bf16", f"bf16 hardware, {' and '.join(hardware)}")
    return Choice("fp32", "this CPU has neither AMX-BF16 nor AVX512-BF16")


def autocast(device: torch.device, precision: str):
    """Context in which matrix products run in `precision`; for fp32 it does nothing."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[precision])


def find_compiler() -> str | None:
    """Path of the C++ compiler that torch.compile would call ($CXX, else the system's usual one), or None."""
    usual = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    return shutil.which(os.environ.get("CXX") or usual)


def choose_compile(
    wanted: bool | None, device: torch.device, flops: float = math.inf, minutes: float | None = None
) -> Choice:
    """(use torch.compile?, reason); None = where it can work, for a run of `flops` and at most `minutes` that gains by
    it: judged by its settings alone, so that it is compiled, or not, each time it is repeated.

    Raises UserError where it is wanted and cannot."""
    if wanted is False:
        return Choice(False, "as asked")
    missing = _missing_for_compile(device)
    if wanted and missing:
        raise UserError(f"--compile true: torch.compile cannot work here: {missing}; or leave the flag out")
    if missing:
        return Choice(False, f"slower without: {missing}")
    if wanted is None and device.type == "mps":
        return Choice(False, "torch.compile is a prototype on MPS; --compile true tries it")
    seconds = min(flops / USUAL_FLOPS[device.type], 60 * (minutes or math.inf))
    if wanted is None and seconds < COMPILE_FROM_S:
        return Choice(False, f"a run of about {seconds:.0f} s ends before compiling pays; --compile true does it")
    return Choice(True, "as asked" if wanted else f"found {'triton and ' * (device.type == 'cuda')}{find_compiler()}")


def _missing_for_compile(device) -> str:
    """What stands in the way of torch.compile and what to do, or an empty string."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if find_compiler() is None:
        wanted = os.environ.get("CXX")
        return f"$CXX is {wanted!r}, which is no program" if wanted else "no C++ compiler (install g++, or set CXX)"
    include = sysconfig.get_paths()["include"]  # inductor's kernels are Python extensions
    return "" if (Path(include) / "Python.h").exists() else f"no Python.h in {include} (install the Python headers)"


def compile_parts(model) -> None:
    """torch.compile a TRMModel for training: one graph of the blocks serves every visit; shapes are static."""
    model.net.apply_blocks = torch.compile(model.net.apply_blocks, dynamic=False)
    model.token_loss = torch.compile(model.token_loss, dynamic=False)


class _FreeCores:
    """How many cores other processes leave free, measured from one look to the next; the first is of the import."""

    PERIOD = 0.3  # s between looks: the system counts in hundredths

    def __init__(self):
        self.seen, self.free = self._clock(), float("inf")

    def _clock(self):
        """Cores, and three clocks in s: wall, time that those cores worked, time that they worked for this process."""
        import psutil

        times = psutil.cpu_times(percpu=True)
        cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(len(times))
        kinds = "user nice system irq softirq steal".split()
        worked = sum(getattr(times[core], kind, 0) for core in cores if core < len(times) for kind in kinds)
        return len(cores), time.perf_counter(), worked, time.process_time()

    def __call__(self, most: int) -> int:
        if time.perf_counter() - self.seen[1] > self.PERIOD:
            (_, wall, worked, own), self.seen = self.seen, self._clock()
            cores, others = self.seen[0], (self.seen[2] - worked) - (self.seen[3] - own)
            self.free = cores - max(0, others) / (self.seen[1] - wall)
        return max(1, min(most, int(min(self.free, most) + 0.3)))  # what takes less than 0.7 of a core is no rival


free_cores = _FreeCores()  # free_cores(most): as many threads as have a core to themselves, from 1 to most


def share_cores(steps: Iterable) -> Iterator:
    """Yield from an iterator, each step on as many of torch's threads as other processes leave cores free, never more
    than now; at the end the number is as before.

    GNU OpenMP's threads spin while they wait for one that has no core: with every core busy, all of them decode at a
    tenth of the speed of one. Attention of one query sums by threads, so that fp32 logits differ in their last bits."""
    most = torch.get_num_threads()
    try:
        torch.set_num_threads(free_cores(most))
        for step in steps:
            yield step
            if (threads := free_cores(most)) != torch.get_num_threads():
                torch.set_num_threads(threads)
    finally:
        torch.set_num_threads(most)


def mix_seed(*numbers) -> int:
    """One 63-bit seed from several whole numbers."""
    seed = 0
    for number in numbers:
        seed = (seed * 6364136223846793005 + number + 1442695040888963407) % 2**63
    return seed


def keep_freed_memory() -> None:
    """Let a CPU process keep and reuse the memory that tensors free (Linux with glibc; elsewhere nothing happens).

    By default every large tensor is mapped and unmapped anew, and a training step spends a fifth of its time in page
    faults. Call it before the first large tensor: torch reads its switch for huge pages once."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)  # bytes, the most that it takes
        mallopt(_M_TOP_PAD, 64 * 1024**2)


def describe(device: torch.device) -> str:
    """One line: name, capability and memory of a GPU; name, instruction sets and threads of a CPU."""
    if device.type == "cuda":
        p = torch.cuda.get_device_properties(device)
        return f"{p.name}, sm{p.major}{p.minor}, {p.total_memory / GIB:.1f} GiB"
    if device.type == "mps":
        return f"Apple GPU, {torch.mps.recommended_max_memory() / GIB:.1f} GiB recommended"
    name = torch.cpu.get_capabilities().get("cpu_name") or "CPU"
    threads = torch.get_num_threads()
    return f"{name}, {', '.join(cpu_features()) or 'no AVX2'}, {threads} thread{'s' * (threads > 1)}"


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given, so that a clock reads the truth."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def peak_rss_bytes() -> int:
    """The most host memory that this process has held at once, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # not getrusage: there, a child starts with the peak of the process that started it
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import psutil

    info = psutil.Process().memory_info()
    if hasattr(info, "peak_wset"):  # Windows
        return info.peak_wset
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Interrupt:
    """Turns the first SIGINT, SIGTERM or SIGHUP (a terminal that was closed; not under nohup, which ignores it) into a
    flag that a loop polls, so that it ends with a checkpoint.

    A second SIGINT raises KeyboardInterrupt. The old handlers come back at the end; outside the main thread,
    where Python allows no handlers, nothing is caught.

        with Interrupt() as interrupt:
            while not interrupt.requested: ...
    """

    def __init__(self):
        self.signal_name: str | None = None  # its name, once one has come
        self._old = {}

    @property
    def requested(self) -> bool:
        return self.signal_name is not None

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGINT, signal.SIGTERM]
            if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
                numbers.append(signal.SIGHUP)
            self._old = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def _handle(self, number, frame):
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_name = self.signal_name or signal.Signals(number).name

    def __exit__(self, *exc):
        for number, handler in self._old.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._old = {}
