"""ResourceMonitor and MonitoringConfig: samples, and when a warning comes and when not."""

import logging
import threading
import time
from dataclasses import asdict, dataclass, field

import psutil
import pytest
import torch
import yaml

from src.config import parse_flags, run
from src.training import monitor
from src.training.monitor import MonitoringConfig, ResourceMonitor


@pytest.fixture
def watch():
    """watch(every=..., **config): a monitor that is closed after the test; by default its thread never samples."""
    watches = []

    def make(every=3600.0, device=None, **config):
        watches.append(ResourceMonitor(MonitoringConfig(**config), device, every))
        return watches[-1]

    yield make
    for each in watches:
        each.close()


@pytest.fixture
def clock(monkeypatch):
    """A clock that only its own sleep moves, in place of the monitor's: a busy machine cannot change what it shows."""

    class Clock:
        now = 0.0

        def monotonic(self):
            return self.now

        perf_counter = monotonic

        def sleep(self, seconds):
            self.now += seconds

    monkeypatch.setattr(monitor, "time", Clock())
    return monitor.time


def warnings_of(caplog):
    assert all(r.levelno == logging.WARNING and r.name == "src.training.monitor" for r in caplog.records)
    return [r.getMessage() for r in caplog.records]


def busy(seconds=0.05):
    """Keep the CPU busy, so that its use is above 0."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


class TestSamples:
    def test_figures_are_those_of_this_process(self, watch):
        watched = watch()
        psutil.cpu_percent()
        busy()
        watched.sample()
        figures = watched.figures
        assert figures.keys() == {"cpu_percent", "memory_percent", "rss_gib"}
        assert 0 < figures["cpu_percent"] <= 100 and 0 < figures["memory_percent"] < 100
        assert figures["rss_gib"] == pytest.approx(psutil.Process().memory_info().rss / 1024**3, abs=0.05)

    def test_batch_time_is_the_median(self, watch):
        watched = watch()
        for seconds in (0.001, 0.1, 0.001, 0.001, 0.1):
            with watched.batch():
                time.sleep(seconds)
        watched.sample()
        assert 0.001 <= watched.figures["batch_s"] < 0.1

    def test_the_thread_samples_by_itself_and_stops(self):
        before = threading.active_count()
        with ResourceMonitor(every=0.01) as watched:
            assert threading.active_count() == before + 1
            deadline = time.monotonic() + 5
            while not watched.figures and time.monotonic() < deadline:
                time.sleep(0.01)
            assert watched.figures["rss_gib"] > 0
        assert threading.active_count() == before

    def test_stopping_does_not_wait_for_the_next_sample(self):
        watched, start = ResourceMonitor(every=3600), time.monotonic()
        watched.close()
        watched.close()
        assert time.monotonic() - start < 1

    def test_gpu_memory(self, watch, monkeypatch, caplog):
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 6 * 1024**3)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d: type("P", (), {"total_memory": 8 * 1024**3}))
        watched = watch(device=torch.device("cuda"), gpu_memory_warning_threshold=70)
        watched.sample()
        assert (watched.figures["gpu_memory_gib"], watched.figures["gpu_memory_percent"]) == (6.0, 75.0)
        (line,) = warnings_of(caplog)
        assert line == "GPU memory held is 75 % (this process: 6.0 GiB), above gpu_memory_warning_threshold 70"


class TestWarnings:
    def test_past_a_threshold_of_0(self, watch, caplog):
        watched = watch(cpu_warning_threshold=0, memory_warning_threshold=0)
        psutil.cpu_percent()
        busy()
        watched.sample()
        cpu, memory = warnings_of(caplog)
        assert cpu == f"CPU use is {watched.figures['cpu_percent']:.0f} %, above cpu_warning_threshold 0"
        assert f"memory in use is {watched.figures['memory_percent']:.0f} % (this process: " in memory
        assert memory.endswith("GiB), above memory_warning_threshold 0")

    def test_never_past_100(self, watch, caplog):
        watched = watch(cpu_warning_threshold=100, memory_warning_threshold=100)
        for _ in range(3):
            busy(0.01)
            watched.sample()
        assert warnings_of(caplog) == []

    def test_a_slow_batch(self, watch, caplog, clock):
        watched = watch(memory_warning_threshold=100, slow_batch_threshold=4)
        for seconds in [0.1] * 12 + [1.5]:
            with watched.batch():
                clock.sleep(seconds)
        watched.sample()
        (line,) = warnings_of(caplog)
        assert line == "a batch took 1.50 s, 15.0 times the median of 0.10 s, above slow_batch_threshold 4"
        caplog.clear()
        watched.sample()  # it is reported once
        assert warnings_of(caplog) == []

    def test_a_batch_that_hangs_is_told_before_it_is_done(self, watch, caplog, clock):
        watched = watch(memory_warning_threshold=100, slow_batch_threshold=4)
        for _ in range(12):
            with watched.batch():
                clock.sleep(0.1)
        with watched.batch():
            clock.sleep(1.5)
            watched.sample()
            assert len(warnings_of(caplog)) == 1

    def test_the_first_batches_are_slow_by_nature(self, watch, caplog, clock):
        watched = watch(memory_warning_threshold=100, slow_batch_threshold=30)
        for seconds in [40.0] + [0.1] * 12:
            with watched.batch():
                clock.sleep(seconds)
        watched.sample()
        assert warnings_of(caplog) == []

    def test_a_batch_of_less_than_a_second_is_not_slow(self, watch, caplog):
        watched = watch(memory_warning_threshold=100, slow_batch_threshold=0)
        for _ in range(12):
            with watched.batch():
                pass
        watched.sample()
        assert watched.figures["batch_s"] > 0 and warnings_of(caplog) == []

    def test_a_failed_batch_is_over(self, watch, caplog, clock):
        """After an exception the batch is over, so time that passes later does not count as a batch that hangs."""
        watched = watch(memory_warning_threshold=100, slow_batch_threshold=4)
        for _ in range(12):
            with pytest.raises(ValueError, match="broken"), watched.batch():
                raise ValueError("broken")
        clock.sleep(1.5)
        watched.sample()
        assert watched.figures["batch_s"] == 0 and warnings_of(caplog) == []

    def test_a_kind_is_told_once_a_minute(self, watch, caplog):
        watched = watch(memory_warning_threshold=0)
        for _ in range(5):
            watched.sample()
        assert len(warnings_of(caplog)) == 1

    def test_what_lasts_is_told_ever_more_seldom(self, watch, caplog, clock):
        watched, told = watch(memory_warning_threshold=0), []
        for second in range(500):
            watched.sample()
            told += [second] * (len(warnings_of(caplog)) - len(told))
            clock.sleep(1)
        assert told == [0, 60, 180, 420]  # intervals of 60, 120 and 240 s


@dataclass
class Settings:
    """Settings of some program.

    Args:
        lr: its own
        monitoring: the section
    """

    lr: float = 1.0
    monitoring: MonitoringConfig = field(default_factory=MonitoringConfig)


class TestConfig:
    def test_it_is_a_section_of_the_yaml_and_its_fields_are_flags(self, tmp_path):
        path = tmp_path / "settings.yaml"
        path.write_text("lr: 2\nmonitoring:\n  cpu_warning_threshold: 90\n  slow_batch_threshold: 2\n")
        flags = "--monitoring.slow_batch_threshold 3 --monitoring.tensorboard false --monitoring.wandb_project trm"
        (settings,) = parse_flags("", Settings, argv=[*flags.split(), "--config", str(path)])
        expected = MonitoringConfig(90.0, slow_batch_threshold=3.0, tensorboard=False, wandb_project="trm")
        assert settings == Settings(2.0, expected)
        path.write_text(yaml.safe_dump(asdict(settings)))  # as in a run folder
        assert parse_flags("", Settings, argv=["--config", str(path)]) == (settings,)

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            ("--monitoring.cpu_warning_threshold -1", "monitoring: cpu_warning_threshold is -1.0: set it to 0 or more"),
            ("--monitoring.cpu_warnig_threshold 1", "did you mean --monitoring.cpu_warning_threshold?"),
            ("--monitoring.cpu_warning_threshold abc", "--monitoring.cpu_warning_threshold abc: expected float"),
        ],
    )
    def test_a_mistake_is_one_line(self, words, said, capsys):
        with pytest.raises(SystemExit) as caught:
            run(lambda: parse_flags("", Settings, argv=words.split()))
        err = capsys.readouterr().err
        assert caught.value.code == 2 and said in err and err.count("\n") == 1

    @pytest.mark.parametrize("name", ["cpu_warning_threshold", "slow_batch_threshold"])
    @pytest.mark.parametrize("value", [-1.0, float("nan")])
    def test_a_threshold_below_0_is_refused(self, name, value):
        with pytest.raises(ValueError, match=f"{name} is {value}"):
            MonitoringConfig(**{name: value})
