"""All device-specific code: chooses the device, precision and compiler of a run, with the reason (CUDA, MPS, CPU)."""

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
COMPILE_S = 40  # seconds that the first compilation takes on two cores
COMPILE_FROM_S = 120  # a compiled step takes 2/3 of an eager one, so compiling pays off after 3 x COMPILE_S
USUAL_FLOPS = {"cpu": 1e11, "cuda": 2e13, "mps": 1e12}  # per second, to estimate a run's time before it starts
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # constants of malloc.h


class Choice(NamedTuple):
    """A setting chosen for the user, and the reason to print. Unpacks as (value, reason)."""

    value: str | bool
    reason: str


def choose_device(wanted: str = "auto") -> torch.device:
    """Returns the device; auto = CUDA, else MPS, else CPU. Raises UserError for a device that is unknown or missing."""
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind, _, index = wanted.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (index and not (kind == "cuda" and index.isdecimal())):
        raise UserError(f"--device {wanted}: unknown; choose auto, cpu, cuda, cuda:N or mps")
    if kind == "cuda":
        _need_cuda(wanted, int(index or 0))
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"--device mps: torch {torch.__version__} finds no Apple GPU; use --device cpu or auto")
    return torch.device(wanted)


def _need_cuda(wanted, index):
    if not torch.cuda.is_available():
        if torch.version.cuda is None and torch.version.hip is None:
            built, advice = "built without CUDA", "install a CUDA build of torch, or use"
        else:
            built, advice = "built for CUDA, but finds no usable GPU or driver", "check nvidia-smi, or use"
        raise UserError(f"--device {wanted}: torch {torch.__version__} is {built}; {advice} --device cpu")
    count = torch.cuda.device_count()
    if index >= count:
        have = "cuda:0 only" if count == 1 else f"cuda:0 to cuda:{count - 1}"
        raise UserError(f"--device {wanted}: there is no such GPU; this machine has {have}")


def cpu_features() -> list[str]:
    """Returns which of AVX2, AVX512, AVX512-BF16 and AMX-BF16 this CPU has."""
    names = {"avx2": "AVX2", "avx512_f": "AVX512", "avx512_bf16": "AVX512-BF16", "amx_bf16": "AMX-BF16"}
    found = torch.cpu.get_capabilities()
    return [name for key, name in names.items() if found.get(key)]


def choose_precision(wanted: str, device: torch.device) -> Choice:
    """Returns (fp32 | bf16 | fp16, reason); auto = the fastest that the hardware supports.

    bf16 also runs without hardware support, only slower, so it is accepted on request; fp16 on a CPU is not."""
    best = _best_precision(device)
    if wanted == "auto":
        return best
    if wanted not in DTYPES:
        raise UserError(f"--precision {wanted}: unknown; choose auto, {', '.join(DTYPES)}")
    if wanted == "fp16" and device.type == "cpu":
        raise UserError("--precision fp16 is for GPUs: on a CPU choose bf16, fp32 or auto")
    slow = wanted == "bf16" and best.value != "bf16" and device.type != "mps"
    return Choice(wanted, "as requested; slow, because this machine has no bf16 hardware" if slow else "as requested")


def _best_precision(device) -> Choice:
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if (major, minor) >= (8, 0):
            return Choice("bf16", f"bf16 hardware, sm{major}{minor}")
        return Choice("fp16", f"with loss scaling; sm{major}{minor} has no bf16 hardware (from sm80)")
    if device.type == "mps":
        return Choice("fp32", "autocast gains little on MPS; bf16 and fp16 only on request")
    hardware = [name for name in ("AMX-BF16", "AVX512-BF16") if name in cpu_features()]
    if hardware:
        return Choice("bf16", f"bf16 hardware, {' and '.join(hardware)}")
    return Choice("fp32", "this CPU has neither AMX-BF16 nor AVX512-BF16")


def autocast(device: torch.device, precision: str):
    """Returns a context in which matrix products run in `precision`; for fp32 it does nothing."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[precision])


def find_compiler() -> str | None:
    """Returns the path of the C++ compiler that torch.compile would call ($CXX, or the system's default), or None."""
    usual = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    return shutil.which(os.environ.get("CXX") or usual)


def choose_compile(
    wanted: bool | None, device: torch.device, flops: float = math.inf, minutes: float | None = None
) -> Choice:
    """Returns (whether to use torch.compile, reason).

    wanted: None = compile if it works here and the run is long enough to gain from it. flops, minutes: the work and the
    time limit of the run. Its length is estimated from these alone, so that a repeated run makes the same choice.
    Raises UserError if compiling is wanted but cannot work."""
    if wanted is False:
        return Choice(False, "as requested")
    missing = _missing_for_compile(device)
    if wanted and missing:
        raise UserError(f"--compile true: torch.compile cannot work: {missing}; or leave the flag out")
    if missing:
        return Choice(False, f"torch.compile cannot work: {missing}; training is slower")
    if wanted is None and device.type == "mps":
        return Choice(False, "torch.compile is experimental on MPS; try it with --compile true")
    seconds = min(flops / USUAL_FLOPS[device.type], 60 * (minutes or math.inf))
    if wanted is None and seconds < COMPILE_FROM_S:
        reason = f"a run of about {seconds:.0f} s is too short to gain from torch.compile"
        return Choice(False, f"{reason}; force it with --compile true")
    if wanted:
        return Choice(True, "as requested")
    return Choice(True, f"found {'triton and ' * (device.type == 'cuda')}{find_compiler()}")


def _missing_for_compile(device) -> str:
    """Returns what torch.compile lacks on this machine and what to do, or an empty string."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if find_compiler() is None:
        wanted = os.environ.get("CXX")
        return f"$CXX is {wanted!r}, not a program" if wanted else "no C++ compiler (install g++, or set CXX)"
    include = sysconfig.get_paths()["include"]  # inductor's kernels are Python extensions
    return "" if (Path(include) / "Python.h").exists() else f"no Python.h in {include} (install the Python headers)"


def device_of(model) -> torch.device:
    """Returns the device of a model. An ONNX graph has no parameters, and takes its inputs on the CPU."""
    return next(model.parameters(), torch.empty(0)).device


def compile_parts(model, lengths_vary: bool = False) -> None:
    """Compiles a TRMModel for training. Every visit uses the same graph of the blocks.

    lengths_vary: the rows of one batch are longer than those of another. One graph then serves all lengths; static
    graphs are faster, but each new length would take as long to compile as the first."""
    model.net.apply_blocks = torch.compile(model.net.apply_blocks, dynamic=lengths_vary)
    model.token_loss = torch.compile(model.token_loss, dynamic=lengths_vary)


class _FreeCores:
    """Measures how many cores other processes left free since the previous call (the first call: since import)."""

    PERIOD = 0.3  # seconds between measurements: the system's clocks tick in hundredths

    def __init__(self):
        self.seen, self.free = self._clock(), float("inf")

    def _clock(self):
        """Returns the number of usable cores; in seconds: wall time, busy time of those cores, our own CPU time."""
        import psutil

        times = psutil.cpu_times(percpu=True)
        cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(len(times))
        kinds = "user nice system irq softirq steal".split()
        worked = sum(getattr(times[core], kind, 0) for core in cores if core < len(times) for kind in kinds)
        return len(cores), time.perf_counter(), worked, time.process_time()

    def __call__(self, most: int) -> int:
        if time.perf_counter() - self.seen[1] > self.PERIOD:
            (_, wall, worked, own), self.seen = self.seen, self._clock()
            others = (self.seen[2] - worked) - (self.seen[3] - own)  # busy time of other processes
            self.free = self.seen[0] - max(0, others) / (self.seen[1] - wall)
        return max(1, min(most, int(min(self.free, most) + 0.3)))  # ignores up to 0.3 of a core that others use


free_cores = _FreeCores()  # free_cores(most): number of threads that get a core each, from 1 to most


def share_cores(steps: Iterable) -> Iterator:
    """Yields from an iterator, and before each step sets torch's threads to the number of free cores.

    Never uses more threads than torch has at the start, and restores that number at the end. GNU OpenMP's threads
    spin while they wait for a thread that has no core: on a busy machine all threads together decode at a tenth of the
    speed of one. The attention of one query sums per thread, so fp32 logits may differ in their last bits."""
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
    """Returns one 63-bit seed made from several integers."""
    seed = 0
    for number in numbers:
        seed = (seed * 6364136223846793005 + number + 1442695040888963407) % 2**63
    return seed


def seed_device(device: torch.device, seed: int) -> None:
    """Seeds torch's random numbers of the CPU and of this device.

    torch.manual_seed would also queue a call, with a stack trace, for every kind of device that was never used: at each
    step, that takes 1.5 ms and memory that is not freed."""
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        getattr(torch, device.type).manual_seed(seed)


def keep_freed_memory() -> None:
    """Makes a CPU process keep and reuse the memory of freed tensors (Linux with glibc; elsewhere it does nothing).

    By default every large tensor is mapped and unmapped again, and a training step spends a fifth of its time in page
    faults. Call this before the first large tensor, because torch reads its huge-page setting only once."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)  # bytes; the largest allowed value
        mallopt(_M_TOP_PAD, 64 * 1024**2)


def describe(device: torch.device) -> str:
    """Returns one line: name, capability and memory of a GPU, or name, instruction sets and threads of a CPU."""
    if device.type == "cuda":
        p = torch.cuda.get_device_properties(device)
        return f"{p.name}, sm{p.major}{p.minor}, {p.total_memory / GIB:.1f} GiB"
    if device.type == "mps":
        return f"Apple GPU, {torch.mps.recommended_max_memory() / GIB:.1f} GiB recommended"
    name = torch.cpu.get_capabilities().get("cpu_name") or "CPU"
    threads = torch.get_num_threads()
    return f"{name}, {', '.join(cpu_features()) or 'no AVX2'}, {threads} thread{'s' * (threads > 1)}"


def synchronize(device: torch.device) -> None:
    """Waits until the device has finished all queued work, so that timings are right."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def peak_rss_bytes() -> int:
    """Returns the peak resident memory of this process in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would include the peak of the parent process
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
    """Turns the first SIGINT, SIGTERM or SIGHUP into a flag. A loop polls it and can stop with a checkpoint.

    SIGHUP means that the terminal was closed; it stays ignored under nohup. A second SIGINT raises KeyboardInterrupt.
    The old handlers are restored at the end. Outside the main thread Python allows no handlers, so nothing is caught.

        with Interrupt() as interrupt:
            while not interrupt.requested: ...
    """

    def __init__(self):
        self.signal_name: str | None = None  # name of the first signal
        self._old = {}

    @property
    def requested(self) -> bool:
        return self.signal_name is not None

    @property
    def cause(self) -> str:
        """The name of the signal; without one, another process of the run got it."""
        return self.signal_name or "a signal to another process"

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
