"""Tests of runtime.py: choices of device, precision and compiler, with simulated hardware."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from src import runtime
from src.config import parse_flags
from src.errors import UserError
from src.runtime import (
    Interrupt,
    autocast,
    choose_compile,
    choose_device,
    choose_precision,
    describe,
    mix_seed,
    peak_rss_bytes,
)
from src.training.train_config import RuntimeConfig

ROOT = Path(__file__).resolve().parent.parent
CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda", 0), torch.device("mps")


@pytest.fixture
def machine(monkeypatch):
    """Returns a function that makes torch report the given hardware."""

    def pretend(gpus=0, mps=False, capability=(8, 0), features=()):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(features, True))

    return pretend


@pytest.mark.parametrize(
    ("gpus", "mps", "expected"), [(2, True, "cuda"), (0, True, "mps"), (0, False, "cpu"), (1, False, "cuda")]
)
def test_auto_device_prefers_cuda_then_mps(machine, gpus, mps, expected):
    machine(gpus=gpus, mps=mps)
    assert choose_device("auto") == torch.device(expected)


def test_named_devices(machine):
    machine(gpus=2)
    assert choose_device("cuda:1") == torch.device("cuda", 1)
    assert choose_device("cpu") == CPU


@pytest.mark.parametrize(
    ("gpus", "wanted", "said"),
    [
        (0, "cuda", "--device cpu"),
        (0, "cuda:1", "--device cpu"),
        (2, "cuda:2", "cuda:0 to cuda:1"),
        (1, "cuda:7", "cuda:0 only"),
        (0, "mps", "no Apple GPU"),
        (1, "gpu", "unknown"),
        (1, "cuda:x", "unknown"),
        (1, "cuda:-1", "unknown"),
        (1, "cpu:3", "unknown"),
        (1, "", "unknown"),
    ],
)
def test_a_device_that_is_not_here_is_one_line(machine, gpus, wanted, said):
    machine(gpus=gpus)
    with pytest.raises(UserError, match=said) as caught:
        choose_device(wanted)
    assert f"--device {wanted}" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("device", "capability", "features", "expected"),
    [
        (CUDA, (9, 0), (), "bf16"),
        (CUDA, (8, 0), (), "bf16"),
        (CUDA, (7, 5), ("amx_bf16",), "fp16"),
        (MPS, (8, 0), ("amx_bf16",), "fp32"),
        (CPU, (8, 0), (), "fp32"),
        (CPU, (8, 0), ("avx2", "avx512_f"), "fp32"),
        (CPU, (8, 0), ("amx_bf16",), "bf16"),
        (CPU, (8, 0), ("avx512_bf16",), "bf16"),
    ],
)
def test_auto_precision_follows_the_hardware(machine, device, capability, features, expected):
    machine(gpus=1, capability=capability, features=features)
    precision, reason = choose_precision("auto", device)
    assert precision == expected and reason


def test_wanted_precision(machine):
    machine(features=())
    assert choose_precision("fp32", CPU).value == "fp32"
    precision, reason = choose_precision("bf16", CPU)
    assert precision == "bf16" and "slow" in reason
    with pytest.raises(UserError, match="fp16"):
        choose_precision("fp16", CPU)
    with pytest.raises(UserError, match="int4"):
        choose_precision("int4", CPU)


def test_autocast_runs_products_in_the_precision():
    a = torch.randn(4, 4)
    with autocast(CPU, "bf16"):
        assert (a @ a).dtype == torch.bfloat16
    with autocast(CPU, "fp32"):
        assert (a @ a).dtype == torch.float32


def test_compile_needs_a_compiler_and_headers(monkeypatch, tmp_path):
    monkeypatch.setattr(runtime, "find_compiler", lambda: "/usr/bin/g++")
    monkeypatch.setattr(runtime.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert choose_compile(None, CPU).value is False  # no Python.h
    (tmp_path / "Python.h").touch()
    assert choose_compile(None, CPU) == (True, "found /usr/bin/g++")
    assert choose_compile(True, CPU).value is True
    assert choose_compile(False, CPU) == (False, "as requested")
    assert choose_compile(None, MPS).value is False
    assert choose_compile(None, CPU, flops=1e12).value is False and choose_compile(None, CPU, flops=1e15).value is True
    assert choose_compile(None, CPU, flops=1e15, minutes=1) == (
        False,
        "a run of about 60 s is too short to gain from torch.compile; force it with --compile true",
    )
    assert choose_compile(True, CPU, flops=1e12).value is True and choose_compile(None, CPU, 1e15, 3).value is True
    monkeypatch.setattr(runtime, "find_compiler", lambda: None)
    chosen, reason = choose_compile(None, CPU)
    assert chosen is False and "g++" in reason
    with pytest.raises(UserError, match="--compile true"):
        choose_compile(True, CPU)


def test_compile_on_cuda_needs_triton(monkeypatch):
    monkeypatch.setattr(runtime.importlib.util, "find_spec", lambda name: None)
    assert choose_compile(None, CUDA).value is False
    with pytest.raises(UserError, match="triton"):
        choose_compile(True, CUDA)


def test_find_compiler_obeys_cxx(monkeypatch, tmp_path):
    compiler = tmp_path / "my-c++"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert runtime.find_compiler() == str(compiler)
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    assert runtime.find_compiler() is None


def test_mixed_seeds_differ_and_repeat():
    seeds = [mix_seed(seed, step) for seed in range(20) for step in range(20)]
    assert len(set(seeds)) == 400 and all(0 <= seed < 2**63 for seed in seeds)
    assert seeds[21] == mix_seed(1, 1) != mix_seed(1, 1, 0)


def test_describe_cpu():
    assert f"{torch.get_num_threads()} thread" in describe(CPU)


def test_peak_rss_is_of_this_process_and_grows():
    grow = (
        "from src.runtime import peak_rss_bytes as peak; before = peak(); x = b'1' * 100_000_000; print(before, peak())"
    )
    ballast = b"1" * 500_000_000  # a child must not inherit the peak of its parent
    assert peak_rss_bytes() > len(ballast)
    out = subprocess.run([sys.executable, "-c", grow], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    before, after = map(int, out.split())
    assert after < len(ballast)
    assert 80e6 < after - before < 160e6


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupt_turns_the_first_signal_into_a_flag(number):
    if number == signal.SIGHUP and signal.getsignal(number) != signal.SIG_DFL:
        pytest.skip("the tests run under nohup")
    old = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Interrupt() as interrupt:
        assert not interrupt.requested
        os.kill(os.getpid(), number)
        assert interrupt.requested and interrupt.signal_name == number.name
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == old


def test_a_second_ctrl_c_raises_and_handlers_come_back():
    old = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # a second SIGTERM does nothing
        assert interrupt.signal_name == "SIGTERM"
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == old


def test_interrupt_leaves_nohup_alone():
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupt() as interrupt:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not interrupt.requested
    finally:
        signal.signal(signal.SIGHUP, old)


def test_interrupt_outside_the_main_thread_does_nothing():
    seen = []

    def work():
        with Interrupt() as interrupt:
            seen.append(interrupt.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]


def test_runtime_flags(capsys):
    (config,) = parse_flags("", RuntimeConfig, argv=["--device", "cpu", "--precision=fp32"])
    assert config == RuntimeConfig("cpu", "fp32")
    with pytest.raises(SystemExit) as caught:
        parse_flags("", RuntimeConfig, argv=["--precision", "fp8"])
    assert caught.value.code == 2 and "fp8" in capsys.readouterr().err


class TestFreeCores:
    def clocks(self, monkeypatch, *readings):
        readings = iter(readings)
        monkeypatch.setattr(runtime._FreeCores, "_clock", lambda self: next(readings))
        return runtime._FreeCores()

    @pytest.mark.parametrize(
        "worked, own, threads", [(0, 0, 4), (4, 4, 4), (4, 3.8, 4), (4, 3, 3), (4, 1, 1), (8, 0.5, 1)]
    )
    def test_threads_are_what_others_leave(self, monkeypatch, worked, own, threads):
        """Four cores, measured over the last second."""
        now = time.perf_counter()
        cores = self.clocks(monkeypatch, (4, now - 1, 10, 5), (4, now, 10 + worked, 5 + own))
        assert cores(4) == threads and cores(1) == 1

    def test_a_short_while_tells_nothing_new(self, monkeypatch):
        assert self.clocks(monkeypatch, (4, time.perf_counter(), 0, 0))(3) == 3

    def test_the_machine_is_read(self):
        cores = runtime._FreeCores()
        cores.seen = (*cores.seen[:1], cores.seen[1] - 1, *cores.seen[2:])
        assert 1 <= cores(8) <= 8 and -1 <= cores.free <= cores.seen[0]

    def test_the_number_of_threads_comes_back(self, monkeypatch):
        free = iter([2, 1, 2])
        monkeypatch.setattr(runtime, "free_cores", lambda most: next(free))
        before = torch.get_num_threads()
        torch.set_num_threads(2)
        try:
            steps = runtime.share_cores(torch.get_num_threads() for _ in range(9))
            assert [next(steps) for _ in range(3)] == [2, 1, 2]
            steps.close()
            assert torch.get_num_threads() == 2
        finally:
            torch.set_num_threads(before)
