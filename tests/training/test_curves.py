"""curves.py and experiments/compare_runs.py: reading logs, drawing curves, and the table of several runs."""

import json

import numpy as np
import pytest
import yaml
from matplotlib import image
from matplotlib.figure import Figure
from trainers import read_metrics

from experiments import compare_runs
from src.config import run
from src.errors import UserError
from src.training import curves
from src.training.curves import (
    METRICS_FILE,
    label_ends,
    plot_learning_curve,
    read_series,
    read_settings,
    set_limits,
    smooth,
    thin,
)


def write(folder, *records, settings=None):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / METRICS_FILE).write_text("".join(json.dumps(record) + "\n" for record in records))
    if settings is not None:
        (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder


def a_run(folder, steps=20, end=1.0, settings=None, without=(), speed=1000.0):
    """Log a run whose bits per byte fall to about `end`, evaluated every 5 steps; the best evaluation is at step 15."""
    records = []
    for step in range(1, steps + 1):
        bits = end + 2.0 / step
        train = {"step": step, "ce_loss": 2 * bits, "bits_per_byte": bits, "lr": 1e-3, "grad_norm": 1.0 / step}
        records.append(train | {"tokens": 64 * step, "tokens_per_s": speed + step % 2, "elapsed_s": 6.0 * step})
        if step % 5 == 0:
            valid = bits + 0.01 * abs(step - 15)
            records.append({"step": step, "valid_loss": 2 * valid, "valid_bits_per_byte": valid})
    records = [{name: value for name, value in record.items() if name not in without} for record in records]
    return write(folder, *records, settings=settings)


class TestReading:
    def test_a_series_has_each_step_once_and_in_order(self, tmp_path):
        """A resumed run whose log was not cut: lines that it logged again replace the earlier ones."""
        losses = [(1, 1.0), (2, 2.0), (3, 3.0), (2, 20.0), (4, 4.0)]
        write(tmp_path, *({"step": step, "loss": loss} for step, loss in losses), {"step": 4, "valid_loss": 9.0})
        series = read_series(tmp_path, "loss", "valid_loss", "lr")
        assert series["loss"].tolist() == [[1, 1.0], [2, 20.0], [3, 3.0], [4, 4.0]]
        assert series["valid_loss"].tolist() == [[4, 9.0]]
        assert series["lr"].shape == (0, 2)

    def test_null_is_left_out_and_a_half_line_too(self, tmp_path):
        write(tmp_path, {"step": 1, "loss": 1.0}, {"step": 2, "loss": None})
        with (tmp_path / METRICS_FILE).open("a") as file:
            file.write('{"step": 3, "lo')
        assert read_series(tmp_path, "loss")["loss"].tolist() == [[1, 1.0]]
        assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]

    @pytest.mark.parametrize(
        "line",
        [
            *("oops", "[1]", "3", '{"loss": 1.0}', '{"step": null}', '{"step": -1}', '{"step": 1.5}', '{"step": true}'),
            *('{"step": 2, "loss": "x"}', '{"step": 2, "loss": [1]}', '{"step": 2, "loss": NaN}', "\xff", "[" * 5000),
            *('{"step": 2, "loss": 1e999}', '{"step": 2, "loss": 1' + "0" * 400 + "}", '{"step": 1' + "0" * 5000 + "}"),
        ],
        ids=range(16),
    )
    def test_a_line_that_is_no_record_is_named_once_and_passed_over(self, tmp_path, capsys, line):
        text = f'{{"step": 1, "loss": 2}}\n{line}\n{{"step": 3, "loss": 1}}\n'
        (tmp_path / METRICS_FILE).write_bytes(text.encode("latin-1"))
        for _ in range(2):
            assert [record["step"] for record in read_metrics(tmp_path)] == [1, 3]
            assert read_series(tmp_path, "loss")["loss"].tolist() == [[1, 2], [3, 1]]
        told = capsys.readouterr().err.splitlines()
        assert told == [f"{tmp_path / METRICS_FILE}, line 2 is not a record of a step: skipped"]

    def test_a_line_that_is_no_record_is_not_drawn(self, tmp_path):
        write(tmp_path, {"step": 1, "loss": 2.0}, {"step": 2, "loss": "x"}, [1], {"step": 3, "loss": 1.0})
        assert plot_learning_curve(tmp_path) is not None

    def test_no_log(self, tmp_path):
        with pytest.raises(UserError, match=r"nowhere/metrics\.jsonl: No such file"):
            read_metrics(tmp_path / "nowhere")

    def test_settings_of_sections_are_flat(self, tmp_path):
        write(tmp_path, settings={"lr": 0.1, "monitoring": {"tensorboard": True, "deeper": {"x": 1}}, "paths": ["a"]})
        assert read_settings(tmp_path) == {
            **{"lr": 0.1, "monitoring.tensorboard": True, "monitoring.deeper.x": 1, "paths": ["a"]},
        }
        assert read_settings(tmp_path / "nowhere") == {}


class TestShapes:
    def test_thin_takes_means_of_neighbours(self):
        points = np.column_stack((np.arange(10.0), np.arange(10.0) ** 2))
        assert thin(points, limit=5).tolist() == [[0.5, 0.5], [2.5, 6.5], [4.5, 20.5], [6.5, 42.5], [8.5, 72.5]]
        assert thin(points, limit=10) is points

    @pytest.mark.parametrize("number", [1001, 1999, 123_457])
    def test_thin_keeps_the_mean_and_the_order(self, number):
        points = np.column_stack((np.arange(number), np.sin(np.arange(number))))
        few = thin(points)
        assert len(few) == 1000 and (np.diff(few[:, 0]) > 0).all()
        assert few[0, 0] < number / 1000 and few[-1, 0] > number * 0.998
        weights = np.bincount(np.searchsorted(few[:, 0], points[:, 0]).clip(max=999), minlength=1000)
        assert weights.max() <= 2 * (number // 1000 + 1)

    def test_smooth_keeps_a_constant_up_to_its_ends(self):
        assert smooth(np.column_stack((np.arange(50), np.full(50, 3.0))))[:, 1] == pytest.approx(3.0)
        assert smooth(np.empty((0, 2))).shape == (0, 2)

    def test_smooth_takes_noise_away(self):
        noise = np.column_stack((np.arange(600), np.random.default_rng(0).normal(size=600)))
        assert smooth(noise)[:, 1].std() < 0.3 * noise[:, 1].std()

    def test_limits_leave_the_steep_start_out(self):
        axes = Figure().add_subplot()
        set_limits(axes, [np.array([[1, 100.0], [50, 2.0], [100, 1.0]]), np.empty((0, 2))])
        low, high = axes.get_ylim()
        assert 0.5 < low < 1 and 2 < high < 3 and axes.get_xlim() == (0, 102)

    @pytest.mark.parametrize("heights", [[0.5, 0.5, 0.5], [0.99, 1.0, 1.0], [0.0, 0.0, 0.01], [5.0, -5.0, 0.5], [0.5]])
    def test_labels_do_not_touch_nor_leave_the_frame(self, heights):
        axes = Figure().add_subplot()
        axes.set_ylim(0, 1)
        label_ends(axes, [(height, str(height), "k") for height in heights])
        placed = sorted(text.xy[1] for text in axes.texts)
        assert (np.diff(placed) >= 0.0649).all() and placed[0] >= -1e-9 and placed[-1] <= 1 + 1e-9
        order = [float(text.get_text()) for text in sorted(axes.texts, key=lambda text: text.xy[1])]
        assert order == sorted(heights)


class TestLearningCurve:
    @pytest.mark.parametrize(
        ("steps", "without"), [(200, ()), (1, ()), (20, ("bits_per_byte", "valid_loss", "grad_norm", "lr"))]
    )
    def test_one_whole_picture(self, tmp_path, steps, without):
        path = plot_learning_curve(a_run(tmp_path, steps, without=without), "a run")
        assert image.imread(path).shape == (840, 1350, 4) and image.imread(path).std() > 0.05
        assert sorted(p.name for p in tmp_path.iterdir()) == ["learning_curve.png", METRICS_FILE]

    def test_a_diverged_run(self, tmp_path):
        write(tmp_path, *({"step": s, "loss": None if s > 3 else 1.0, "grad_norm": 0.0} for s in range(1, 9)))
        assert plot_learning_curve(tmp_path, "diverged").exists()

    def test_nothing_is_no_picture(self, tmp_path):
        write(tmp_path)
        assert plot_learning_curve(tmp_path, "empty") is None
        assert not (tmp_path / "learning_curve.png").exists()

    def test_a_step_logged_twice_is_drawn_once(self, tmp_path, monkeypatch):
        """It is drawn like an uninterrupted run: each curve has every step once, in order."""
        lines = (a_run(tmp_path, 40) / METRICS_FILE).read_text().splitlines(keepends=True)
        (tmp_path / METRICS_FILE).write_text("".join(lines[:30] + lines[20:]))
        figures = []
        monkeypatch.setattr(curves, "save_picture", lambda figure, path: figures.append(figure))
        plot_learning_curve(tmp_path)
        loss, bits, rate, norm = figures[0].axes
        for axes in (loss, bits, rate, norm):
            assert list(axes.lines[0].get_xdata()) == list(range(1, 41))
        assert list(loss.lines[2].get_xdata()) == [5, 10, 15, 20, 25, 30, 35, 40]


def compare(capsys, *words):
    """(rows of the table as lists of words, text on stderr)."""
    compare_runs.main([str(word) for word in words])
    out = capsys.readouterr()
    return [line.split() for line in out.out.splitlines()], out.err


class TestCompareRuns:
    SETTINGS = {"lr": 0.1, "recursion": "trm", "n_layers": 2, "monitoring": {"tensorboard": True}}

    @pytest.fixture
    def two(self, tmp_path):
        trm = a_run(tmp_path / "trm", settings=self.SETTINGS | {"save_dir": "a"})
        llama = self.SETTINGS | {"save_dir": "b", "recursion": "none", "norm": "pre", "monitoring": {"tensorboard": 0}}
        return trm, a_run(tmp_path / "llama", steps=30, end=1.2, settings=llama, speed=2000.0)

    def test_table_and_picture(self, two, tmp_path, capsys):
        (head, *rows), err = compare(capsys, *two, "--output", tmp_path / "runs.png")
        assert err == f"drawn: {tmp_path / 'runs.png'}\n"
        assert head[0] == "run" and [row[0] for row in rows] == ["trm", "llama"]
        assert rows[0][1:] == [f"{1 + 2 / 15:.4f}", "15", "20", "1.28K", "1,000"]
        assert rows[1][1:] == [f"{1.2 + 2 / 15:.4f}", "15", "30", "1.92K", "2,000"]
        assert image.imread(tmp_path / "runs.png").std() > 0.05

    def test_labels_say_in_what_the_runs_differ(self, two):
        runs = [compare_runs.load_run(folder) for folder in two]
        assert compare_runs.labels(runs) == ["trm: recursion trm", "llama: recursion none, norm pre"]
        assert compare_runs.labels(runs[:1]) == ["trm"]

    def test_x_is_steps_tokens_or_minutes(self, two):
        loaded = compare_runs.load_run(two[0])
        assert [compare_runs.along(loaded, x)["bits_per_byte"][-1, 0] for x in compare_runs.X] == [20, 1280, 2.0]
        valid = compare_runs.along(loaded, "elapsed")["valid_bits_per_byte"]  # lines of evaluations have no elapsed_s
        assert valid[:, 0] == pytest.approx([0.5, 1.0, 1.5, 2.0])
        assert (valid[:, 1] == loaded.series["valid_bits_per_byte"][:, 1]).all()

    def test_it_is_drawn_along_x(self, two, monkeypatch, capsys):
        monkeypatch.setattr(compare_runs, "save_picture", lambda figure, path: figure)
        figure = compare_runs.draw([compare_runs.load_run(folder) for folder in two], "tokens", "x.png")
        train, valid, rate, speed = figure.axes
        assert list(train.lines[0].get_xdata()) == list(range(64, 1281, 64))
        assert list(valid.lines[2].get_xdata()) == [320 * n for n in range(1, 7)]
        assert [list(line.get_ydata()) for line in rate.lines] == [[1e-3] * 20, [1e-3] * 30]
        assert speed.get_xlabel() == "training tokens"
        assert [text.get_text() for text in figure.legends[0].get_texts()] == [
            *("trm: recursion trm", "llama: recursion none, norm pre"),
        ]

    def test_a_run_that_was_never_judged(self, tmp_path, capsys):
        folder = a_run(tmp_path / "young", steps=1, without=("tokens", "tokens_per_s", "lr"))
        (_, row), _ = compare(capsys, folder, "--output", tmp_path / "one.png")
        assert row == ["young", "-", "-", "1", "-", "-"]

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["nowhere"], "nowhere/metrics.jsonl: No such file"),
            ([], "0 runs: give 1 to 7"),
            (["losses"], "losses has logged no bits per byte"),
            (["timeless", "--x", "elapsed"], "timeless has logged no elapsed_s: choose another --x"),
            (["trm", "--output", "nowhere/x.png"], "cannot write the picture nowhere/x.png: No such file"),
            (["trm", "--x", "hours"], "--x hours"),
        ],
    )
    def test_a_mistake_is_one_line_and_code_2(self, words, said, tmp_path, monkeypatch, capsys):
        a_run(tmp_path / "trm")
        a_run(tmp_path / "losses", without=("bits_per_byte", "valid_bits_per_byte"))
        a_run(tmp_path / "timeless", without=("elapsed_s",))
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as caught:
            run(lambda: compare_runs.main(words))
        err = capsys.readouterr().err
        assert caught.value.code == 2 and said in err and err.startswith("error: ") and err.count("\n") == 1
