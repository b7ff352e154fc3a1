"""Compare language models on SST-5 and CFIMDB (film reviews): zero-shot and fine-tuned accuracy, plain and recursive.

    python convert.py data/stories260K/stories260K.bin runs/stories260K --tokenizer data/stories260K/tok512.bin
    python train_trm_lm.py --config configs/english.yaml
    python train_trm_lm.py --config configs/english.yaml --recursion none --embed_mean 0 --n_layers 4 \\
        --prelude_layers 0 --coda_layers 0 --max_steps 2400 --save_dir runs/english_plain
    python experiments/classify.py --models runs/stories260K runs/english_plain runs/english_trm --seeds 0 1 2
    python experiments/classify.py --models runs/english_trm --tasks sst --seeds 0 --lr 1e-3 --epochs 8   # override
    python experiments/classify.py --table                     # mean and spread of all runs so far

The first three commands make the models, and the fourth compares them. The folder of --data has sst-train.txt,
sst-dev.txt and sst-label-mapping.json, and the same three files of cfimdb. After fine-tuning, the best epoch on the dev
set is taken, and its accuracy on the same dev set is reported, as in the published figures. A seed changes the order of
examples and the dropout; zero-shot has no seed. Each run appends one JSON line to the file `output`. At the end, a
table of all runs is printed. Each setting of fine-tuning is a flag that overrides the task's own.
"""

import dataclasses
import math
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # finds src when run as a script

from experiments import records  # noqa: E402
from src.checkpoint import load_config, load_model  # noqa: E402
from src.config import parse_flags, run  # noqa: E402
from src.metrics import count_parameters  # noqa: E402
from src.model import TRMModel  # noqa: E402
from src.runtime import choose_device, keep_freed_memory  # noqa: E402
from src.tasks import classification as task  # noqa: E402
from src.tasks.finetune import FinetuneConfig, finetune  # noqa: E402

# settings that differ from the defaults of FinetuneConfig
TASKS = {
    "sst": {"epochs": 3, "batch_size": 32, "lr": 1e-3},
    "cfimdb": {"epochs": 3, "batch_size": 16, "lr": 1e-3},
}


@dataclass
class ClassifyConfig:
    """What to run.

    Args:
        models: checkpoint folders or run folders of the language models
        tasks: data sets: sst, cfimdb, or both
        options: methods: prompt (zero-shot), finetune, or both
        seeds: seeds of fine-tuning; each seed is one run
        data: folder with the labelled texts
        output: file to which each run appends one JSON line
        table: only print the table of `output`, without new runs
        threads: number of CPU threads; torch chooses if not given
        device: device to run on: auto (CUDA, else MPS, else CPU), cpu, cuda, cuda:1, ..., or mps
    """

    models: list[str] = field(default_factory=list)
    tasks: list[str] = field(default_factory=lambda: list(TASKS))
    options: list[str] = field(default_factory=lambda: ["prompt", "finetune"])
    seeds: list[int] = field(default_factory=lambda: [0])
    data: str = "data/reviews"
    output: str = "runs/classify.jsonl"
    table: bool = False
    threads: int | None = None
    device: str = "auto"

    def __post_init__(self):
        for name, known in (("tasks", TASKS), ("options", ("prompt", "finetune"))):
            for value in getattr(self, name):
                if value not in known:
                    raise ValueError(f"{name} {value}: choose from {', '.join(known)}")
        if not self.seeds:
            raise ValueError("seeds is empty: give at least one")
        if not (self.models or self.table):
            raise ValueError("models is missing: give checkpoint or run folders, or --table")


TUNED = [f for f in dataclasses.fields(FinetuneConfig) if f.name not in ("save_dir", "seed", "resume")]
Overrides = records.overrides("Settings of fine-tuning, each of which overrides the task's own.", TUNED, FinetuneConfig)


def parse_args(argv=None) -> tuple[ClassifyConfig, dict]:
    """Returns the script's settings, and {name: value} of the fine-tuning settings that override a task's own."""
    config, changes = parse_flags(__doc__, ClassifyConfig, Overrides, argv=argv)
    return config, records.given(changes)


def zero_shot(folder, names, dev, device) -> list[float]:
    """Returns the accuracy after each recursion step."""
    classifier = task.LlamaZeroShotClassifier(*load_model(folder, device), names)
    scores = classifier.by_depth([example.text for example in dev], batch_size=16)
    return task.accuracies(scores, dev)


def fine_tuned(folder, names, train, dev, device, settings) -> list[float]:
    """Fine-tune, and return the accuracy of the best epoch after each supervision step."""
    with tempfile.TemporaryDirectory() as save_dir:
        config = FinetuneConfig(save_dir=f"{save_dir}/run", **settings)
        made = finetune(config, folder, train, dev, names, device)
    if made is None:  # Ctrl-C during the training
        raise KeyboardInterrupt
    best, tokenizer = made
    samples, _ = task.encode(dev, tokenizer, best.model.config.max_seq_len)
    return task.accuracies(task.predict(best, samples), dev)


def measure(config, changes, name, folder, option, seed) -> dict:
    """Do one run and return its record, which is one line of `output`."""
    data, device, start = Path(config.data), choose_device(config.device), time.monotonic()
    names = task.read_label_names(data / f"{name}-label-mapping.json")
    train, dev = (task.read_examples(data / f"{name}-{part}.txt", names) for part in ("train", "dev"))
    settings = TASKS[name] | changes | {"seed": seed} if option == "finetune" else {}
    if option == "prompt":
        accuracies = zero_shot(folder, names, dev, device)
    else:
        accuracies = fine_tuned(folder, names, train, dev, device, settings)
    model = load_config(folder)
    with torch.device("meta"):
        parameters = count_parameters(TRMModel(model))["total"]
    return {
        **{"model": folder, "recursion": model.recursion, "parameters": parameters, "task": name, "option": option},
        **{"seed": seed, "changes": changes if option == "finetune" else {}, "settings": settings},
        **{"accuracy": accuracies[-1], "by_step": accuracies, "minutes": round((time.monotonic() - start) / 60, 2)},
    }


def print_table(path) -> None:
    """Print a row per model, task and option: runs, mean and standard deviation of the accuracy, mean after each step.

    If a seed was run several times with the same settings, its last run counts."""
    runs = records.by_seed(path, "task", "option", name="model")
    width = max((len(model) for *_, model in runs), default=5)
    print(f"task    option    {'model':{width}}  parameters  runs  accuracy  sd      minutes  by step")
    for (name, option, model), seeds in sorted(runs.items()):
        values = [record["accuracy"] for record in seeds]
        deviation = statistics.stdev(values) if len(values) > 1 else math.nan
        steps = [statistics.mean(step) for step in zip(*(record["by_step"] for record in seeds))]
        print(
            f"{name:6}  {option:8}  {model:{width}}  {seeds[0]['parameters']:10,}  {len(seeds):4}  "
            f"{statistics.mean(values):8.4f}  {deviation:6.4f}  {statistics.mean(r['minutes'] for r in seeds):7.1f}  "
            f"{' '.join(f'{step:.4f}' for step in steps)}"
        )


def main(argv=None) -> None:
    config, changes = parse_args(argv)
    keep_freed_memory()
    if config.threads:
        torch.set_num_threads(config.threads)
    for folder in config.models:
        for name in config.tasks:
            for option in config.options:
                for seed in config.seeds if option == "finetune" else [0]:
                    records.keep(config.output, measure(config, changes, name, folder, option, seed))
    print_table(config.output)


if __name__ == "__main__":
    run(main)
