"""What the experiments of several seeds share: a file of one JSON line per run, and flags that change a recipe."""

import dataclasses
import json
from pathlib import Path

from src.errors import UserError


def keep(output, record: dict) -> None:
    """Append one run to the file, which is made where there is none."""
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    with open(output, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def by_seed(output, *kind: str, name: str) -> dict[tuple, list[dict]]:
    """{(values of `kind`, name and changes): records, one per seed}; of runs with the same seed, the last counts.

    UserError where the file is none of runs."""
    runs = {}
    try:
        for line in Path(output).read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            changes = " ".join(f"{k}={v}" for k, v in record["changes"].items())
            key = (*(record[part] for part in kind), f"{record[name]} {changes}".strip())
            runs.setdefault(key, {})[record["seed"]] = record
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--output {output}: no file of runs ({error}); run one first") from None
    return {key: list(seeds.values()) for key, seeds in runs.items()}


def overrides(doc: str, fields, *classes):
    """A dataclass of the same fields, none of which is set, with the classes' words on them: flags for changes."""
    cls = dataclasses.make_dataclass("Overrides", [(f.name, f.type | None, None) for f in fields])
    cls.__doc__ = f"{doc}\n\n    Args:" + "".join(c.__doc__.split("Args:")[1].rstrip() for c in classes)
    return cls


def given(changes) -> dict:
    """{flag: value} of the overrides that are set."""
    return {name: value for name, value in dataclasses.asdict(changes).items() if value is not None}
