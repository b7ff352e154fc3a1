"""Run folders: config.yaml, `step_NNNNNNNN/` checkpoints and the links `last` and `best`; one process at a time."""

import fcntl
import os
import shutil
import sys
from pathlib import Path

import yaml

from src.checkpoint import load_state, read_weights, save_checkpoint
from src.errors import UserError

# settings that may differ between a run and its continuation
_FREE_ON_RESUME = {
    *("save_dir", "resume", "max_minutes", "eval_every", "eval_batches", "save_every", "log_every", "keep_checkpoints"),
    *("device", "precision", "compile", "shard", "num_workers", "num_proc", "cache_dir", "grad_accum", "max_skipped"),
    *("sample_prompt", "sample_tokens", "monitoring"),
}
_SAID_BY_ITSELF = {"save_dir", "resume"}


def start(folder: Path, settings: dict):
    """Make a run folder with its config.yaml, which `--config` takes back.  UserError where it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        beside = folder / ".config.yaml.writing"
        beside.write_text(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), encoding="utf-8")
        beside.replace(folder / "config.yaml")
    except OSError as error:
        raise UserError(f"cannot write to save_dir {folder}: {error.strerror}; choose another folder") from None


def check_writable(folder: Path, flag: str = "save_dir"):
    """UserError where a run folder could not be made; makes nothing, as there may be other mistakes to tell first."""
    parent = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"cannot write to {flag} {folder}: {parent} is no writable folder; choose another folder")


def settings_of(folder: Path) -> dict:
    """The settings in a run folder's config.yaml; none where no run has begun.  UserError where it is broken."""
    try:
        return dict(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, TypeError, yaml.YAMLError):
        raise UserError(f"{folder}/config.yaml is broken: mend it, or choose another save_dir") from None


def check_resume(folder: Path, settings: dict, resume: bool):
    """Whether the run in a folder may go on with these settings: UserError where not, a line for each that changed."""
    if not resume:
        raise UserError(f"save_dir {folder} holds a run: go on with --resume true, or choose another folder")
    before = settings_of(folder)
    for name, new in settings.items():
        old = before.get(name)
        if old != new and name not in _FREE_ON_RESUME:
            raise UserError(
                f"--{name} is {new}, but the run in {folder} has {old}: "
                f"resume with the same settings (--config {folder}/config.yaml) or choose another save_dir"
            )
        if old != new and name not in _SAID_BY_ITSELF:
            print(f"--{name} is {new}, and was {old} before", file=sys.stderr)


def newest_whole(folder: Path):
    """(checkpoint folder, its state) of the newest step that can be read; None where a run has written none yet.

    A broken one is named on stderr. UserError where all are broken."""
    checkpoints = sorted(folder.glob("step_*"), reverse=True)
    for path in checkpoints:
        try:
            state = load_state(path)
            for name in ("model.safetensors", "ema.safetensors"):
                if name.startswith("model") or (path / name).exists() or state["ema_updates"]:
                    read_weights(path / name)
            return path, state
        except UserError as error:
            print(f"{error}; going back to the checkpoint before", file=sys.stderr)
    if checkpoints:
        raise UserError(
            f"none of the checkpoints in {folder} can be read: choose another save_dir; perhaps --init_from can still "
            "take weights from one"
        )
    return None


class RunLock:
    """Holds a run folder for this process, until `release` or its end.  UserError where another process holds it.

    A lock of this process alone, which its loading processes do not inherit and keep."""

    def __init__(self, folder: Path):
        self.file = open(folder / ".lock", "a+", encoding="utf-8")  # noqa: SIM115
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # by the system, either means that it is held
            self.file.seek(0)
            holder = self.file.read().strip() or "unknown"
            raise UserError(
                f"save_dir {folder} is in use by another run (process {holder}): wait for it, or choose another folder"
            ) from None
        self.file.truncate(0)
        self.file.write(f"{os.getpid()}\n")
        self.file.flush()

    def release(self):
        self.file.close()


def save(folder: Path, name: str, best: bool, keep: int, *checkpoint):
    """Write a checkpoint of a run, let `last`, and `best` if it is, lead to it, and prune the old ones.

    `checkpoint` as in `save_checkpoint`, after the folder. UserError where it cannot be written."""
    if not folder.is_dir():  # making it anew would hide what happened
        raise UserError(f"save_dir {folder} has vanished while the run went on: the checkpoints were in it")
    save_checkpoint(folder / name, *checkpoint)
    try:
        for link in ("best", "last") if best else ("last",):
            point(folder / link, name)
        prune(folder, keep)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; its checkpoints are whole") from None


def point(link, target_name: str):
    """Make run_folder/last or run_folder/best lead to a checkpoint beside it, in one atomic step."""
    link = Path(link)
    beside = link.with_name(f".{link.name}.link")
    beside.unlink(missing_ok=True)
    beside.symlink_to(target_name)
    os.replace(beside, link)


def prune(run_folder, keep: int):
    """Delete all but the newest `keep` step_* folders and the one that `best` leads to, and what a crash left over."""
    run_folder = Path(run_folder)
    best = (run_folder / "best").resolve()
    old = [folder for folder in sorted(run_folder.glob("step_*"))[:-keep] if folder.resolve() != best]
    for folder in old + list(run_folder.glob(".step_*")):
        shutil.rmtree(folder)
