"""Shared by the experiments with several seeds: a file with one JSON line per run, and flags that override a recipe."""

import dataclasses
import json
from pathlib import Path

from src.errors import UserError


def keep(output, record: dict) -> None:
    """Append one run to the file, which is created if needed."""
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    with open(output, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def records_of(output) -> list[dict]:
    """Returns the runs in a file, in the order in which they were appended."""
    return [json.loads(line) for line in Path(output).read_text(encoding="utf-8").splitlines()]


def by_seed(output, *kind: str, name: str) -> dict[tuple, list[dict]]:
    """Groups the runs in a file by what was run. Returns {key: records, one per seed}.

    A key is a tuple. It has the values of the fields `kind`, and at the end the value of the field `name` with the
    settings that were changed, such as `anchor_trm lr=0.002`. If a seed was run more than once, its last run counts.
    Raises UserError if the file is not a file of runs."""
    runs = {}
    try:
        for record in records_of(output):
            changes = " ".join(f"{k}={v}" for k, v in record["changes"].items())
            key = (*(record[part] for part in kind), f"{record[name]} {changes}".strip())
            runs.setdefault(key, {})[record["seed"]] = record
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--output {output}: this is not a file of runs ({error}): do a run first") from None
    return {key: list(seeds.values()) for key, seeds in runs.items()}


def overrides(doc: str, fields, *classes):
    """Returns a dataclass of optional fields, for flags that override a recipe: None means "as in the recipe".

    `fields` are taken from the dataclasses `classes`, and so are their help texts."""
    cls = dataclasses.make_dataclass("Overrides", [(f.name, f.type | None, None) for f in fields])
    cls.__doc__ = f"{doc}\n\n    Args:" + "".join(c.__doc__.split("Args:")[1].rstrip() for c in classes)
    return cls


def given(changes) -> dict:
    """Returns {name: value} of the overrides that are set."""
    return {name: value for name, value in dataclasses.asdict(changes).items() if value is not None}
