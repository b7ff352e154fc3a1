"""Measure what retrieved code is worth in repositories that the model has never seen, at equal numbers of tokens.

    python experiments/retrieval.py                                     # the released checkpoint
    python experiments/retrieval.py --packages jinja2 rich --n_targets 100 --seeds 0 1 2 3 4
    python experiments/retrieval.py --packages ~/my_project --method bm25 --query_tokens 128
    python experiments/retrieval.py --checkpoint runs/code --output runs/retrieval_code.json

The repositories are installed packages, or folders. They must not be in the model's training text; the defaults are not
in that of checkpoints/python. Each seed draws files and, in each, one place at the end of a line: the next
`target_tokens` tokens are the target. Half as many targets more are drawn near the start of files. The docstring of
src/rag/gain.py explains the contexts of a target, such as `retrieved + own`.

Figures are bits per byte of the targets, and exact matches and edit similarity of the line that the model writes next,
greedily, without white space at both ends. The edit similarity is 1 - edit distance / length of the longer line.
`tokens` is the mean length of a context, `shared tokens` the share of a target's distinct tokens that are also in the
context, and `shared lines` the share of its longer lines. `+-` is the standard deviation over seeds. The last table
lets a threshold on the score choose between `retrieved + own` and `own B`. Prints tables in Markdown, and writes all
figures to `output` as JSON.
"""

import importlib.util
import statistics
import sys
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # finds src when run as a script

import numpy as np  # noqa: E402
import torch  # noqa: E402

from src.checkpoint import load_model  # noqa: E402
from src.config import check_writable, parse_flags, run, write_json  # noqa: E402
from src.errors import UserError  # noqa: E402
from src.evaluation.capability_answers import edit_similarity  # noqa: E402
from src.evaluation.scoring import choose_stride  # noqa: E402
from src.rag.gain import (  # noqa: E402
    LEAST_BUDGET,
    Repository,
    Target,
    TargetSettings,
    bits_of,
    draw_targets,
    first_line,
)
from src.rag.index import open_retriever  # noqa: E402
from src.rag.near_copies import line_hashes  # noqa: E402
from src.runtime import DTYPES, choose_device  # noqa: E402
from src.sampling import generate, left_padded  # noqa: E402

THRESHOLDS = [number / 20 for number in range(21)]


@dataclass
class RetrievalConfig:
    """What to measure.

    Args:
        checkpoint: checkpoint or run folder of a causal language model; the flag name may be left out
        packages: installed packages by import name, or folders; each is a repository of its own
        seeds: seeds, each of which draws other files and places
        n_targets: targets per seed inside files; near the start of files there are half as many
        target_tokens: tokens of a target
        budget: most tokens of a context; default: what the model's context has room for
        query_tokens: tokens before the target that are compared with the chunks
        top_k: chunks that are put into a context, as long as they fit
        oracle: chunks among which the oracle chooses
        line_tokens: most tokens that are generated for the next line
        method: how code is compared: tfidf, bm25, checkpoint (this model's states) or sentence; `generate.py --help`
            explains them
        chunk_lines: most lines of a chunk
        batch_size: contexts that are scored at once
        precision: number format of the model's weights and arithmetic
        output: JSON file for all figures
        threads: number of CPU threads; torch chooses if not given
        device: device to run on: auto (CUDA, else MPS, else CPU), cpu, cuda, cuda:1, ..., or mps
    """

    checkpoint: str = "checkpoints/python"
    packages: list[str] = field(default_factory=lambda: ["fsspec", "jinja2", "mpmath", "werkzeug"])
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    n_targets: int = 48
    target_tokens: int = 64
    budget: int | None = None
    query_tokens: int = 64
    top_k: int = 4
    oracle: int = 6
    line_tokens: int = 24
    method: Literal["tfidf", "bm25", "checkpoint", "sentence"] = "tfidf"
    chunk_lines: int = 40
    batch_size: int = 16
    precision: Literal["fp32", "bf16"] = "fp32"
    output: str = "runs/retrieval.json"
    threads: int | None = None
    device: str = "auto"

    def __post_init__(self):
        names = "n_targets target_tokens query_tokens top_k oracle line_tokens chunk_lines batch_size".split()
        for name in names:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: set it to 1 or more")
        if not self.packages or not self.seeds:
            raise ValueError("packages or seeds is empty: give at least one of each")

    def target_settings(self, max_seq_len) -> TargetSettings:
        """Returns how targets are made for a model. Raises UserError if its context has no room for the budget."""
        most = max_seq_len - self.target_tokens
        budget = most if self.budget is None else self.budget
        if not LEAST_BUDGET <= budget <= most:
            wanted = f"set it from {LEAST_BUDGET} to {most}" if most >= LEAST_BUDGET else "lower target_tokens"
            raise UserError(f"budget is {budget} in a context of {max_seq_len} tokens: {wanted}")
        return TargetSettings(budget, self.target_tokens, self.query_tokens, self.top_k, self.oracle)


# ---- repositories ---------------------------------------------------------------------------------------------------


def find_repository(name: str, tokenizer, config: RetrievalConfig) -> Repository:
    """Returns a repository with its index. Raises UserError if it is neither a folder nor an installed package."""
    folder, version = Path(name).expanduser(), ""
    if name.isidentifier():
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations:
            folder = Path(spec.submodule_search_locations[0])
            distributions = metadata.packages_distributions().get(name, [])
            version = metadata.version(distributions[0]) if distributions else ""
    if not folder.is_dir():
        raise UserError(f"packages {name}: it is neither a folder nor an installed package: correct the name")
    retriever = open_retriever(
        [folder], config.method, checkpoint=config.checkpoint, chunk_lines=config.chunk_lines, suffixes=[".py"]
    )
    ids = tokenizer.encode_batch([source.text for source in retriever.sources])
    return Repository(name, version, retriever, ids)


# ---- scores ---------------------------------------------------------------------------------------------------------


def choose_oracle(target: Target, bits: dict[str, float]):
    """Replaces the candidates of each oracle by the best one, in the contexts and in the bits of a target."""
    for kind in sorted({name.rpartition(" ")[0] for name in bits if name.startswith("oracle")}):
        names = [name for name in bits if name.rpartition(" ")[0] == kind]
        best = min(names, key=bits.get)
        bits[kind], target.contexts[kind] = bits[best], target.contexts[best]
        for name in names:
            del bits[name], target.contexts[name]


def next_lines(model, tokenizer, contexts: list[list[int]], config) -> list[str]:
    """Returns the line that the model writes after each context, greedily."""
    lines, order = [""] * len(contexts), sorted(range(len(contexts)), key=lambda n: len(contexts[n]))
    device = model.embed.weight.device
    for start in range(0, len(order), config.batch_size):
        part = order[start : start + config.batch_size]
        ids, mask = left_padded([tokenizer.start(list(contexts[n])) for n in part], tokenizer.pad_id, device)
        made = [b""] * len(part)
        options = {"temperature": 0, "eos_id": tokenizer.end_ids, "attention_mask": mask}
        for column in generate(model, ids, config.line_tokens, **options):
            made = [text + tokenizer.id_to_bytes(new) for text, new in zip(made, column.tolist())]
            if all(b"\n" in text.lstrip() for text in made):
                break
        for number, text in zip(part, made):
            lines[number] = first_line(text.decode(errors="replace"))
    return lines


class Result(NamedTuple):
    """A target after one context."""

    bits: float
    tokens: int
    is_exact: bool
    similarity: float
    shared_tokens: float
    shared_lines: tuple[int, int]  # lines of the target that the context has too, lines of the target


def results_of(model, tokenizer, targets: list[Target], config) -> list[dict[str, Result]]:
    """Returns for each target {name of a context: Result}."""
    bits = bits_of(model, tokenizer, targets, config.batch_size)
    for target, each in zip(targets, bits):
        choose_oracle(target, each)
    places = [(number, name) for number, target in enumerate(targets) for name in target.contexts]
    lines = next_lines(model, tokenizer, [targets[number].contexts[name] for number, name in places], config)
    found = [{} for _ in targets]
    for (number, name), line in zip(places, lines):
        target, context = targets[number], targets[number].contexts[name]
        wanted = line_hashes(tokenizer.decode(target.ids).rpartition("\n")[0])  # the last line is not complete
        shared = int(np.isin(wanted, line_hashes(tokenizer.decode(context))).sum()), len(wanted)
        distinct = set(target.ids)
        found[number][name] = Result(
            bits[number][name],
            len(context),
            line == target.line,
            edit_similarity(line, target.line),
            len(distinct & set(context)) / len(distinct),
            shared,
        )
    return found


# ---- figures --------------------------------------------------------------------------------------------------------


class Seed(NamedTuple):
    """What one seed measured; the lists have one entry per target."""

    targets: list[Target]
    bytes: list[int]
    results: list[dict[str, Result]]

    def part(self, is_start: bool) -> "Seed":
        """Returns the targets near the start of files, or the others."""
        return self.where(lambda target: target.is_start == is_start)

    def where(self, is_kept) -> "Seed":
        """Returns the targets for which is_kept(target) is true."""
        kept = [n for n, target in enumerate(self.targets) if is_kept(target)]
        return Seed(*([values[n] for n in kept] for values in self))

    def bits_per_byte(self, names: list[str]) -> float:
        """Returns bits per byte of all targets; names: the context of each target."""
        return sum(results[name].bits for results, name in zip(self.results, names)) / sum(self.bytes)


def figures_of(seeds: list[Seed], budget: int) -> dict[str, dict]:
    """Returns {context: figures}: bits per byte of each seed, also minus those of `own B`, and means of the rest."""
    found, all_results = {}, [results for seed in seeds for results in seed.results]
    for name in all_results[0]:
        each = [results[name] for results in all_results]
        per_seed = [seed.bits_per_byte([name] * len(seed.targets)) for seed in seeds]
        own = [seed.bits_per_byte([f"own {budget}"] * len(seed.targets)) for seed in seeds]
        found[name] = {
            "tokens": statistics.mean(result.tokens for result in each),
            "bits_per_byte": per_seed,
            "minus_own": [a - b for a, b in zip(per_seed, own)],
            "exact": statistics.mean(result.is_exact for result in each),
            "similarity": statistics.mean(result.similarity for result in each),
            "shared_tokens": statistics.mean(result.shared_tokens for result in each),
            "shared_lines": sum(r.shared_lines[0] for r in each) / max(1, sum(r.shared_lines[1] for r in each)),
        }
    return found


def chosen(seed: Seed, threshold: float, budget: int) -> list[str]:
    """Returns the context that a threshold chooses for each target."""
    return ["retrieved + own" if t.score >= threshold and t.score else f"own {budget}" for t in seed.targets]


def thresholds_of(seeds: list[Seed], budget: int) -> list[dict]:
    """Returns for each threshold the share of targets with retrieved code, and bits per byte of each seed."""
    rows = []
    for threshold in THRESHOLDS:
        names = [chosen(seed, threshold, budget) for seed in seeds]
        share = statistics.mean(name == "retrieved + own" for each in names for name in each)
        per_seed = [seed.bits_per_byte(each) for seed, each in zip(seeds, names)]
        rows.append({"threshold": threshold, "share": share, "bits_per_byte": per_seed})
    return rows


def best_elsewhere(seeds: list[Seed], budget: int) -> list[float]:
    """Returns bits per byte of each seed with, for each repository, the threshold that is best on all others."""
    names = [list(chosen(seed, 2.0, budget)) for seed in seeds]
    for repository in sorted({target.repository for seed in seeds for target in seed.targets}):
        others = [seed.where(lambda target, left_out=repository: target.repository != left_out) for seed in seeds]
        if not others[0].targets:
            continue
        best = min(thresholds_of(others, budget), key=lambda row: statistics.mean(row["bits_per_byte"]))
        for seed, each in zip(seeds, names):
            for number, name in enumerate(chosen(seed, best["threshold"], budget)):
                if seed.targets[number].repository == repository:
                    each[number] = name
    return [seed.bits_per_byte(each) for seed, each in zip(seeds, names)]


def facts_of(config, repositories, seeds: list[Seed], budget: int) -> dict:
    """Returns all figures, as they are written to `output`."""
    facts = {"settings": asdict(config) | {"budget": budget}, "repositories": [], "near_copies": []}
    for name, version, retriever, ids in repositories:
        sizes = {"files": len(ids), "chunks": len(retriever.chunks), "tokens": sum(map(len, ids))}
        facts["repositories"].append({"name": name, "version": version} | sizes)
    pairs = {(t.repository, path) for seed in seeds for t in seed.targets for path in t.near_copies}
    facts["near_copies"] = sorted(f"{repository}: {path}" for repository, path in pairs)
    facts["targets_with_near_copies"] = sum(bool(t.near_copies) for seed in seeds for t in seed.targets)
    for title, is_start in (("inside", False), ("start", True)):
        part = [seed.part(is_start) for seed in seeds]
        facts[title] = {
            "targets": [len(seed.targets) for seed in part],
            "bytes": [sum(seed.bytes) for seed in part],
            "contexts": figures_of(part, budget),
            "thresholds": thresholds_of(part, budget),
            "best_threshold_of_other_repositories": best_elsewhere(part, budget),
        }
    return facts


# ---- tables ---------------------------------------------------------------------------------------------------------


def mean_and_spread(values: list[float]) -> str:
    deviation = f" +- {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{deviation}"


def table_of(part: dict, budget: int) -> list[str]:
    header = "context|tokens|bits per byte|every seed|minus own|exact line|edit similarity|shared tokens|shared lines"
    lines = [f"| {header.replace('|', ' | ')} |", "|---" * 9 + "|"]
    for name, row in sorted(part["contexts"].items(), key=lambda item: -statistics.mean(item[1]["bits_per_byte"])):
        seeds = ", ".join(f"{value:.3f}" for value in row["bits_per_byte"])
        rest = [row[key] for key in ("exact", "similarity", "shared_tokens", "shared_lines")]
        cells = [name, f"{row['tokens']:.0f}", mean_and_spread(row["bits_per_byte"]), seeds]
        cells += [mean_and_spread(row["minus_own"]), *(f"{value:.3f}" for value in rest)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def report(facts: dict) -> str:
    """Returns the tables."""
    lines, budget = [], facts["settings"]["budget"]
    for each in facts["repositories"]:
        name = f"{each['name']} {each['version']}".rstrip()
        lines.append(f"{name}: {each['files']} files, {each['chunks']} chunks, {each['tokens']:,} tokens")
    copies = facts["near_copies"]
    lines.append(
        f"{len(copies)} near copies of a target's file were left out, for {facts['targets_with_near_copies']} targets"
    )
    for title, key in (("inside files", "inside"), ("near the start of files", "start")):
        part = facts[key]
        lines += ["", f"{sum(part['targets'])} targets {title}, {sum(part['bytes']):,} bytes:", ""]
        lines += table_of(part, budget)
        lines += ["", "| threshold | retrieved for | bits per byte |", "|---|---|---|"]
        shown = [row for n, row in enumerate(part["thresholds"]) if n % 2 == 0]
        for row in shown:
            lines.append(
                f"| {row['threshold']:.1f} | {100 * row['share']:.0f} % | {mean_and_spread(row['bits_per_byte'])} |"
            )
        best = mean_and_spread(part["best_threshold_of_other_repositories"])
        lines.append(f"| best on the other repositories | | {best} |")
    return "\n".join(lines)


def measure(model, tokenizer, repositories, config) -> dict:
    """Returns all figures of a model. Raises UserError if the model cannot be measured."""
    choose_stride(model.config)  # refuses a model that is not causal
    settings, seeds = config.target_settings(model.config.max_seq_len), []
    for seed in config.seeds:
        targets = draw_targets(repositories, tokenizer, settings, config.n_targets, seed)
        sizes = [len(tokenizer.decode_bytes(target.ids)) for target in targets]
        seeds.append(Seed(targets, sizes, results_of(model, tokenizer, targets, config)))
        print(f"seed {seed}: {len(targets)} targets", file=sys.stderr)
    return facts_of(config, repositories, seeds, settings.budget)


def parse_args(argv=None) -> RetrievalConfig:
    return parse_flags(__doc__, RetrievalConfig, argv=argv, positional="checkpoint")[0]


def main(argv=None) -> None:
    config = parse_args(argv)
    if config.threads:
        torch.set_num_threads(config.threads)
    Path(config.output).parent.mkdir(parents=True, exist_ok=True)
    check_writable(config.output)
    model, tokenizer = load_model(config.checkpoint, choose_device(config.device), DTYPES[config.precision])
    config.target_settings(model.config.max_seq_len)  # before the indexes are built, which takes a while
    repositories = [find_repository(name, tokenizer, config) for name in config.packages]
    facts = measure(model, tokenizer, repositories, config)
    write_json(config.output, facts)
    print(report(facts))


if __name__ == "__main__":
    run(main)
