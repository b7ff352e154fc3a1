"""Measure on a text what recursion is worth: a ladder of models from a plain transformer to a TRM, with many seeds.

    python experiments/ladder.py --train_paths data/tinyshakespeare/input.txt --jobs 2
    python experiments/ladder.py --train_paths stdlib --tokenizer sentencepiece --overrides vocab_size=2048
    python experiments/ladder.py --train_paths wiki/train_*.jsonl.gz --valid_paths wiki/validation_0.jsonl.gz
    python experiments/ladder.py --train_paths data/tinyshakespeare/input.txt --corpus_bytes 300000 \\
        --rungs plain plain-deep two-stream trm --sweep lr=0.001,0.002 weight_decay=0.1,0.8 dropout=0,0.1,0.2
    python experiments/ladder.py --train_paths data/tinyshakespeare/input.txt --output runs/muon \\
        --rungs plain plain+optimizer=muon two-stream two-stream+optimizer=muon \\
        --sweep lr=0.001,0.002,0.004,0.008,0.016                                    # one setting, on two rungs
    python experiments/ladder.py --train_paths data/tinyshakespeare/input.txt --table     # tables of the runs so far

The rungs. L and `visits` are the layers and the visits per supervision step of the recipe, a model of recursion trm:

    plain        a plain transformer of L layers
    plain-deep   a plain transformer of L x visits layers: a token costs as much as with the loop, parameters are more
    plain-wide   the same FLOPs by width: L layers, wider. Not among the default rungs
    loop         plain, applied `visits` times; it reads the text only at the first visit
    loop-ends    a loop with a prelude and a coda of one layer each; every visit reads the text again
    gated        loop-ends, with a gate between the old state and the new one
    two-stream   the recursion of TRM with y and z, in one supervision step, with gradient through all of its visits
    trm          the recipe: several supervision steps, without gradient from one to the next
    late         a plain transformer of the size of loop-ends whose middle is looped in the last third of the run

loop-ends, gated and late have as many layer applications per token as the loop. They need at least three layers; if the
recipe has fewer, they are narrower, so that all rungs but plain-deep and plain-wide have equally many parameters.
`rung+name=value+name=value` is a rung with other settings, which come before those of the rung, the recipe and the
sweep. Settings that make a rung or change its cost can be given only in this way, not to the sweep.

Without valid_paths, the last tenth of the text is for validation, or every tenth document if there are many documents.
For each rung, the settings in `sweep` are chosen one after the other. Meanwhile, earlier settings have the values that
were chosen for them, and later ones have their first value. These runs are short. They are judged on a slice that is
held out of the training text, not on the validation text. The reported runs train on all training text, slice included,
for as many steps as the table says:

    equal tokens   every rung but plain-deep and plain-wide has the tokens of `steps` training steps of the recipe
    equal FLOPs    every rung has the training FLOPs of `steps` steps of two-stream; visits without gradient count

With corpus_bytes, the text is small and is read many times. Then no run trains on the slice, and each run is reported
at its best evaluation on the slice (averaged weights; of late, since its middle is looped). Plain rungs have a run for
each share in `budgets` of the FLOPs and are reported at the best of these, which favours them; other rungs run once, at
the full FLOPs. There is one table, of equal FLOPs.

Every reported run is scored on the whole validation text, in windows that do not overlap, with the last weights and
with the averaged weights. `difference` is the reported figure minus that of `control` with the same seed: the mean over
the seeds, and its 95 % confidence interval from the paired t distribution; it is bold if 0 is outside. The runs are
subprocesses of train_trm_lm.py, `jobs` at a time. One JSON line per run is in runs.jsonl in `output`. Started again
with the same flags, it does only the runs that are missing. It prints Markdown tables and draws ladder.png.

Time: with one thread of a CPU with AVX-512 and bf16, the default recipe takes 5 minutes for plain, 15 to 20 for a rung
that costs three times as much, and twice that for trm. The defaults are 3 seeds of 8 rungs, with at most two runs each,
and a sweep of 1.2 runs per rung: about 12 hours of one core. `--steps 100` takes a fifteenth of it.
"""

import dataclasses
import json
import math
import random
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # finds src when run as a script

from experiments import arms, ladder_report  # noqa: E402
from experiments.ladder_rungs import (  # noqa: E402
    BIGGER,
    RUNGS,
    assigned,
    parameters_of,
    rung_flags,
    split_rung,
    value_of,
)
from src.config import parse_flags, run  # noqa: E402
from src.data.corpus import read_documents  # noqa: E402
from src.data.token_store import ON_THE_SPOT_VOCAB, content_key, on_the_spot, sampled  # noqa: E402
from src.errors import UserError, few  # noqa: E402
from src.files.text import read_object  # noqa: E402
from src.model_config import TRMConfig  # noqa: E402
from src.tokenizer import read_tokenizer  # noqa: E402
from src.training.curves import read_series  # noqa: E402
from src.training.depths import mean_flops  # noqa: E402
from src.training.train_config import Settings, TrainConfig, read_settings  # noqa: E402

RECIPE = str(arms.ROOT / "configs" / "ladder.yaml")
VALID, SLICE = 0.1, 0.05  # shares of the text that are for validation, and of the training text that are held out
MOST_SLICE = 300_000  # characters
MOST_CHARS = 20_000_000  # longer documents are cut, because readers of .jsonl refuse much longer ones
SWEEP_SEED = 1000  # not among the seeds that are reported
EVALUATIONS = 20  # of a run with corpus_bytes
LOSES = "the tokenizer loses a part of the text, so there are no bits per byte: choose tokenizer byte, or another one"
OWN = {  # settings that every run has from the ladder
    *("save_dir", "seed", "device", "resume", "init_from", "max_steps", "max_minutes", "train_paths", "valid_paths"),
    *("tokenizer", "sp_model", "text_field", "warmup_steps", "eval_batches", "eval_every", "save_every"),
    *("keep_checkpoints", "log_every", "sample_tokens", "overfit", "monitoring.tensorboard"),
}


@dataclass
class LadderConfig(arms.RunsConfig):
    """What to run.

    Args:
        train_paths: the text: files, globs or folders, or stdlib for this Python's standard library
        valid_paths: text for the reported figures; by default, a tenth of the text, or the validation files of stdlib
        text_field: name of the JSON field or parquet column that holds the text
        tokenizer: byte (one token per byte), sentencepiece (trained on the training text), or the path of a tokenizer
        recipe: config file of train_trm_lm.py, of recursion trm, with the settings that all rungs have in common;
            default configs/ladder.yaml: width 256, 2 layers, 3 visits, 2 supervision steps, batches of 32 x 128 tokens,
            AdamW; windows are cut at other places in each epoch
        rungs: models to train, see above
        control: rung from which differences are taken; one for all tables, or two: for equal tokens, for equal FLOPs.
            Default: plain, and for equal FLOPs plain-deep
        steps: training steps of every run in the table of equal tokens; those of equal FLOPs follow from it
        sweep: settings to choose for each rung, as name=value,value; a setting with one value is only set
        sweep_share: length of a run of the sweep, as a share of the run of equal FLOPs. Whether dropout and decay help
            depends on the length, so a short sweep says less about them
        corpus_bytes: train on this many bytes of the training text only, many times
        budgets: with corpus_bytes, shares of the FLOPs at which a plain rung is run
        table: only print the tables and draw the picture of the runs so far
    """

    train_paths: list[str] = field(default_factory=lambda: ["data/tinyshakespeare/input.txt"])
    valid_paths: list[str] = field(default_factory=list)
    text_field: str = "text"
    tokenizer: str = "byte"
    recipe: str = RECIPE
    rungs: list[str] = field(default_factory=lambda: [name for name in RUNGS if name != "plain-wide"])
    control: list[str] = field(default_factory=list)
    steps: int = 1500
    sweep: list[str] = field(
        default_factory=lambda: ["lr=0.001,0.002,0.0005", "norm=post,pre", "weight_decay=0.1,0.5", "dropout=0,0.1"]
    )
    sweep_share: float = 0.2
    corpus_bytes: int | None = None
    budgets: list[float] = field(default_factory=lambda: [0.25, 0.5, 1.0])
    table: bool = False
    output: str = "runs/ladder"

    def __post_init__(self):
        super().__post_init__()
        for name in self.rungs:
            split_rung(name)
        self.rungs = list(dict.fromkeys(self.rungs))
        self.choices = dict(map(_choice, self.sweep))
        if self.steps < 1 or self.corpus_bytes is not None and self.corpus_bytes < 1:
            raise ValueError("steps or corpus_bytes is under 1: set it to 1 or more")
        if taken := OWN & {*self.choices, *(key for name in self.rungs for key in split_rung(name)[1])}:
            raise ValueError(f"{min(taken)} is set by the ladder itself: leave it out of sweep and rungs")
        given = {setting.removeprefix("--").partition("=")[0] for setting in self.overrides}
        if taken := given & OWN - {"warmup_steps", "max_minutes"}:
            raise ValueError(f"{min(taken)} is set by the ladder itself: leave it out of overrides")
        for name in given & set(self.choices):  # a setting of every run
            del self.choices[name]
        if not (0 < self.sweep_share <= 1 and self.budgets and all(0 < share <= 1 for share in self.budgets)):
            raise ValueError("sweep_share and budgets are shares: set them above 0, up to 1")
        if len(self.control) > 2 or not set(self.control) <= set(self.rungs):
            raise ValueError(f"control is {' '.join(self.control)}: name one or two of the rungs")


def _choice(text: str) -> tuple[str, list]:
    """Returns the name and the values of a setting of the sweep."""
    name, values = assigned(text)
    return name, [value_of(value) for value in values.split(",")]


# ---- data -----------------------------------------------------------------------------------------------------------


class Data(NamedTuple):
    """Files of documents, and the tokenizer of all runs."""

    train: Path
    slice: Path
    valid: Path
    tokenizer: str
    vocab_size: int


def hold_back(documents: list[str], share: float, most: float = math.inf) -> tuple[list[str], list[str]]:
    """Returns (documents to keep, documents that are held back: about `share` of the text, at most `most` characters).

    Held back are documents at equal distances, or the end of the text if there are too few documents."""
    total = sum(map(len, documents))
    every = math.ceil(max(1 / share, total / most))
    if len(documents) >= 10 * every:
        held = documents[every - 1 :: every]
        return [text for i, text in enumerate(documents) if i % every != every - 1], held
    kept, held, left = [], [], max(int((1 - share) * total), total - min(most, total))
    for text in documents:
        n = min(left, len(text))
        kept, held, left = [*kept, text[:n]], [*held, text[n:]], left - n
    return list(filter(str.strip, kept)), list(filter(str.strip, held))


def first_bytes(documents: list[str], n: int) -> list[str]:
    """Returns n bytes of text (less if a character would be cut), whole documents in random order first."""
    found = []
    for text in random.Random(0).sample(documents, len(documents)):
        found.append(text.encode()[:n].decode(errors="ignore"))
        n -= len(text.encode())
        if n <= 0:
            return list(filter(str.strip, found))
    raise UserError(f"the training text has {n:,} bytes less than corpus_bytes: lower it, or give more text")


def _without(documents: list[str], others: list[str], what: str) -> list[str]:
    """Returns the documents that are not among `others`, and says on stderr how many are."""
    known = set(others)
    own = [text for text in documents if text not in known]
    if len(own) < len(documents):
        print(f"{len(documents) - len(own)} training documents left out: they are {what}", file=sys.stderr)
    return own


def split_text(config: LadderConfig) -> dict[str, list[str]]:
    """Returns the documents to train on, those of the slice for the sweep, and those for validation."""
    valid_paths = config.valid_paths or (["stdlib-valid"] if config.train_paths == ["stdlib"] else [])
    train = list(read_documents(config.train_paths, config.text_field))
    if valid_paths:
        valid = list(read_documents(valid_paths, config.text_field))
    else:
        train, valid = hold_back(train, VALID)
    train, part = hold_back(_without(train, valid, "validation text"), SLICE, MOST_SLICE)
    train = _without(train, part, "in the slice")
    if config.corpus_bytes:
        train = first_bytes(train, config.corpus_bytes)
    if not (train and part and valid):
        raise UserError("the text is too short to hold back a part of it: give more text")
    return {"train": train, "slice": part, "valid": valid}


def prepare(config: LadderConfig) -> Data:
    """Writes the text to files in the output folder. Raises UserError if it has runs on other text."""
    parts = {
        f"{name}.jsonl": "".join(
            json.dumps({"text": text[start : start + MOST_CHARS]}, ensure_ascii=False) + "\n"
            for text in documents
            for start in range(0, len(text), MOST_CHARS)
        )
        for name, documents in split_text(config).items()
    }
    arms.write_data(config.output, parts, "text")
    files = [Path(config.output) / name for name in parts]
    if config.tokenizer != "sentencepiece":
        return Data(*files, config.tokenizer, read_tokenizer(config.tokenizer).vocab_size)
    size = read_settings(["--config", config.recipe, *config.overrides]).model.vocab_size or ON_THE_SPOT_VOCAB
    key = content_key(files[:2], size)
    tokenizer = on_the_spot(sampled(files[:2], "text", "whole"), key, size, config.output)
    return Data(*files, str(Path(config.output) / f"spm-{key}.model"), tokenizer.vocab_size)


# ---- rungs ----------------------------------------------------------------------------------------------------------


class Rung(NamedTuple):
    """A model to train, and the lengths of its runs.

    Args:
        flags: its settings in addition to the recipe's
        train: the settings of its training
        flops: of training, per token
        tokens: per training step
        steps: training steps of its run at equal FLOPs
        equal_steps: training steps of its run at equal tokens
    """

    flags: dict
    model: TRMConfig
    train: TrainConfig
    flops: float
    tokens: int
    steps: int
    equal_steps: int


def recipe_of(config: LadderConfig, data: Data) -> Settings:
    """Returns the settings of the recipe, with the overrides and the size of the vocabulary."""
    settings = read_settings(["--config", config.recipe, *config.overrides, f"--tokenizer={data.tokenizer}"])
    if settings.model.recursion != "trm" or settings.data.records or settings.train.curriculum.stages:
        raise UserError("the recipe must have recursion trm and no records and no curriculum: choose another recipe")
    if settings.train.max_minutes is not None:
        raise UserError("max_minutes ends a run by time, but the ladder compares equal tokens and FLOPs: leave it out")
    bare = {"prelude_layers": 0, "coda_layers": 0, "gate": False, "injection": "sum"}
    for name, value in bare.items():
        if getattr(settings.model, name) != value:
            raise UserError(f"{name} makes some of the rungs: leave it out of the recipe, or write rung+{name}=...")
    return settings._replace(model=dataclasses.replace(settings.model, vocab_size=data.vocab_size))


def rungs_of(config: LadderConfig, settings: Settings, data: Data) -> dict[str, Rung]:
    """Returns {name: rung} for the rungs of the config.  settings: those of the recipe."""
    words = ["--config", config.recipe, *config.overrides, f"--tokenizer={data.tokenizer}"]
    tokens = config.steps * settings.train.batch_size * settings.model.max_seq_len  # of a run at equal tokens

    def rung_of(name, budget=0.0):
        rung, others = split_rung(name)
        flags = rung_flags(rung, settings.model) | others
        own = read_settings([*words, *arms.flag_words(flags)])
        model = dataclasses.replace(own.model, vocab_size=settings.model.vocab_size)
        flops, step = mean_flops(own.train, model), own.train.batch_size * model.max_seq_len
        steps = [max(1, round(most)) for most in (budget / flops / step, tokens / step)]
        return Rung(flags, model, own.train, flops, step, *steps)

    budget = tokens * rung_of("two-stream").flops
    found = {name: rung_of(name, budget) for name in config.rungs}
    for setting, values in config.choices.items():  # a wrong name or value is reported now, and not by the first run
        for value in values:
            read_settings([*words, *arms.flag_words({setting: value})])
    for name, rung in found.items():
        for setting in config.choices.keys() - split_rung(name)[1].keys():
            if setting in rung.flags or any(_costs_more(rung, setting, value) for value in config.choices[setting]):
                raise UserError(f"{setting} makes the rung {name} or changes its cost: write {name}+{setting}=...")
    return found


def _costs_more(rung: Rung, setting: str, value) -> bool:
    """Whether a setting changes the FLOPs or the tokens of a training step."""
    try:
        model, train = arms.changed(rung.model, {setting: value}), rung.train
        if setting in vars(train):
            train = dataclasses.replace(train, **{setting: value})
    except ValueError as error:  # the value does not go with this rung
        raise UserError(f"sweep, {setting}={value}: {error}") from None
    cost = mean_flops(train, model), train.batch_size * model.max_seq_len
    return cost != (rung.flops, rung.tokens)


# ---- runs -----------------------------------------------------------------------------------------------------------


class Ladder(NamedTuple):
    """Everything that a run needs to know."""

    config: LadderConfig
    settings: Settings
    data: Data
    rungs: dict[str, Rung]


def run_flags(ladder: Ladder, job: arms.Job) -> dict:
    """Returns the settings of a run that do not make its rung: the text, the warm-up, evaluations and checkpoints."""
    config, data, steps = ladder.config, ladder.data, dict(job.changes)["max_steps"]
    is_small = config.corpus_bytes is not None
    judged = job.is_sweep or is_small  # on the slice, which must then be unseen
    return {
        "train_paths": [data.train] if judged else [data.train, data.slice],
        "valid_paths": [data.slice if judged else data.valid],
        "tokenizer": data.tokenizer,
        "warmup_steps": min(ladder.settings.train.warmup_steps, steps // 10),
        **{"eval_batches": 0, "eval_every": -(-steps // EVALUATIONS) if is_small else steps},
        **{"save_every": steps, "keep_checkpoints": 1, "log_every": max(1, steps // 100), "sample_tokens": 0},
        "monitoring.tensorboard": False,
    }


def run_job(ladder: Ladder, job: arms.Job) -> dict:
    """Does one run, and returns its record. A run of the sweep that diverges is the worst of all values."""
    config, rung, steps = ladder.config, ladder.rungs[job.arm], dict(job.changes)["max_steps"]
    flags, is_small = rung.flags | run_flags(ladder, job), config.corpus_bytes is not None
    try:
        folder = arms.train("train_trm_lm.py", config, job, flags, ["--config", config.recipe])
    except UserError as error:
        if not (job.is_sweep and "not finite" in str(error)):
            raise
        return job.facts() | {"updates": 0, "seconds": 0.0, "bits_per_byte": math.inf}
    record, _ = arms.record_of(folder, job)
    if record["updates"] != steps:
        raise UserError(f"the run in {folder} was stopped after step {record['updates']}: start the ladder again")
    tokens = steps * rung.tokens
    parameters = parameters_of(arms.changed(rung.model, dict(job.changes)))
    record |= {"parameters": parameters, "tokens": tokens, "flops": tokens * rung.flops}
    curve = read_series(folder, "valid_bits_per_byte")["valid_bits_per_byte"]
    if not len(curve):
        raise UserError(LOSES)
    begun = curve[curve[:, 0] > rung.train.recursion_from * steps]  # a run chooses its best checkpoint among these
    if job.is_sweep:
        found = {"bits_per_byte": begun[:, 1].min()}
    else:
        found = {name: score(ladder, rung, folder, name) for name in ("last", "averaged")}
        found["bits_per_byte"] = found["averaged"]["bits_per_byte"]
    if is_small and not job.is_sweep:
        found |= {"slice": begun[:, 1].min(), "best_step": int(begun[begun[:, 1].argmin(), 0])}
        shares = [float(step) / steps for step in curve[:, 0]]  # a step may cost more later in the run
        spent = [share * tokens * mean_flops(rung.train, rung.model, share) for share in shares]
        found["curve"] = list(zip(spent, curve[:, 1].tolist()))
        found["best"] = score(ladder, rung, folder, "best")
    return record | found


def tidy(config: LadderConfig, job: arms.Job) -> None:
    """Deletes the optimizer's state of a run whose record is written, and of a run of the sweep also its weights."""
    for folder in job.folder(config.output).glob("step_*" if job.is_sweep else "step_*/state"):
        shutil.rmtree(folder)


def do_all(ladder: Ladder, jobs: list[arms.Job], do) -> list[dict]:
    """Returns the records of runs, and does those that are missing.  do: does one run, as run_job."""
    return arms.do_all(ladder.config, jobs, do, "bits_per_byte", lambda job: tidy(ladder.config, job))


def score(ladder: Ladder, rung: Rung, folder: Path, name: str) -> dict:
    """Returns {nats_per_char, bits_per_byte, bytes, chars} of the whole validation text.

    name: the weights of a run, which are last, averaged (of the last step), or best (averaged, at the best step)."""
    config, found = ladder.config, folder / f"{name}.json"
    words = ["--paths", ladder.data.valid, f"--ema={json.dumps(name != 'last')}", "--json", found]
    length = rung.model.max_seq_len
    words += ["--stride", length, "--batch_size", max(8, 4096 // length), "--device", config.device]
    arms.run_script("eval_lm.py", [folder / ("best" if name == "best" else "last"), *words], config.threads)
    figures = read_object(found)
    if figures["nats_per_char"] is None:
        raise UserError(LOSES)
    return {key: figures[key] for key in ("nats_per_char", "bits_per_byte", "bytes", "chars")}


def choose(ladder: Ladder, do) -> dict[str, dict]:
    """Returns {rung: the settings that the sweep chose}: one setting after the other, by bits per byte of the slice.

    A setting in the name of a rung is not swept for this rung."""
    config, rungs = ladder.config, ladder.rungs
    fixed = {rung: split_rung(rung)[1] for rung in rungs}
    best = {rung: {name: fixed[rung].get(name, values[0]) for name, values in config.choices.items()} for rung in rungs}

    def job(rung, changes):
        steps = max(1, round(config.sweep_share * rungs[rung].steps))
        return arms.Job(rung, (*changes.items(), ("max_steps", steps)), SWEEP_SEED, True)

    for name, values in config.choices.items():
        swept = [rung for rung in rungs if name not in fixed[rung]]
        if len(values) == 1 or not swept:
            continue
        tried = [(rung, best[rung] | {name: value}) for rung in swept for value in values]
        records = do_all(ladder, [job(*each) for each in tried], do)
        for rung in swept:
            own = [(r["bits_per_byte"], i) for i, (r, each) in enumerate(zip(records, tried)) if each[0] == rung]
            best[rung] = tried[min(own)[1]][1]
    rates = [value for value in config.choices.get("lr", ()) if type(value) is not str]
    for rung in rungs if len(rates) > 1 else ():
        if "lr" not in fixed[rung] and best[rung]["lr"] in (min(rates), max(rates)):
            print(f"{rung}: lr {best[rung]['lr']:g} is at the end of the values tried: try more", file=sys.stderr)
    return best


def lengths(config: LadderConfig, name: str, rung: Rung) -> list[int]:
    """Returns the steps of the reported runs of a rung."""
    if config.corpus_bytes is not None:
        shares = config.budgets if rung.model.recursion == "none" else [1.0]
        return [max(1, round(share * rung.steps)) for share in shares]
    return [rung.steps] if split_rung(name)[0] in BIGGER else [rung.equal_steps, rung.steps]


def jobs_of(ladder: Ladder, best: dict[str, dict]) -> list[arms.Job]:
    """Returns the reported runs, seed by seed."""
    config = ladder.config
    return [
        arms.Job(name, (*best[name].items(), ("max_steps", steps)), seed, False)
        for seed in config.seeds
        for name, rung in ladder.rungs.items()
        for steps in dict.fromkeys(lengths(config, name, rung))
    ]


def open_ladder(config: LadderConfig) -> Ladder:
    data = prepare(config)
    settings = recipe_of(config, data)
    ladder = Ladder(config, settings, data, rungs_of(config, settings, data))
    arms.keep_settings(config.output, settings.flat())
    return ladder


def tables_of(ladder: Ladder, records: list[dict]) -> dict[str, dict[str, list[dict]]]:
    """Returns {title: {rung: records, one per seed}} of the reported runs; of equal runs, the last counts."""
    config, tables = ladder.config, {}

    def of(steps, rank=None):
        found = {}
        for name, rung in ladder.rungs.items():
            own = [r for r in records if r["arm"] == name and r["changes"]["max_steps"] in steps(name, rung)]
            own = sorted(own, key=rank, reverse=True) if rank else own  # so that the best comes last
            found[name] = [r for _, r in sorted({r["seed"]: r for r in own}.items())]
        return {name: own for name, own in found.items() if own}

    if config.corpus_bytes is not None:
        tables["equal FLOPs, at the best evaluation"] = of(lambda *each: lengths(config, *each), lambda r: r["slice"])
    else:
        same = [name for name in ladder.rungs if split_rung(name)[0] not in BIGGER]
        tables["equal tokens"] = of(lambda name, rung: [rung.equal_steps] if name in same else [])
        tables["equal FLOPs"] = of(lambda _, rung: [rung.steps])
    return {title: groups for title, groups in tables.items() if groups}


def of_newest_settings(records: list[dict], steps: dict[str, list[int]]) -> list[dict]:
    """Returns the reported runs that have the settings of the newest run of their rung, so that no table mixes them.

    steps: {rung: lengths of its runs}; others do not count. Sweeps with other values or other seeds may have chosen
    other settings before."""

    def chosen(record):
        return {name: value for name, value in record["changes"].items() if name != "max_steps"}

    reported = [r for r in records if not r["is_sweep"] and r["changes"]["max_steps"] in steps.get(r["arm"], ())]
    newest = {record["arm"]: chosen(record) for record in reported}
    kept = [record for record in reported if chosen(record) == newest[record["arm"]]]
    if len(kept) < len(reported):
        print(f"{len(reported) - len(kept)} runs left out: newer ones have other settings", file=sys.stderr)
    return kept


def main(argv=None):
    (config,) = parse_flags(__doc__, LadderConfig, argv=argv)
    ladder = open_ladder(config)
    if config.table:
        known = list(arms.known_runs(config.output).values())
        steps = {name: lengths(config, name, rung) for name, rung in ladder.rungs.items()}
        records = of_newest_settings(known, steps)
    else:

        def do(job):
            return run_job(ladder, job)

        known = records = do_all(ladder, jobs_of(ladder, choose(ladder, do)), do)
    tables = tables_of(ladder, records)
    if not tables:
        runs = [f"{r['arm']} with {r['changes']['max_steps']:,} steps" for r in known if not r["is_sweep"]]
        advice = f"its runs are {few(dict.fromkeys(runs))}: give their --rungs and --steps"
        found = advice if runs else "start it without --table"
        raise UserError(f"{config.output} has no reported run of these rungs and lengths; {found}")
    print(ladder_report.report(tables, config.control))
    print(f"drawn: {ladder_report.draw(tables, Path(config.output) / 'ladder.png')}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
