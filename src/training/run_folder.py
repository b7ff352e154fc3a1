"""Run folders: config.yaml, `step_NNNNNNNN/` checkpoints and the links `last` and `best`; one process at a time.

A run folder may be moved, and copied with or without its links: what lies in it is found from where it is now. Where a
system has no links, as Windows for most users, `last` and `best` are files that hold the checkpoint's name.
"""

import json
import os
import re
import sys
from pathlib import Path

from src.checkpoint import FILES, follow, load_state, save_checkpoint
from src.errors import UserError, few
from src.files import folders
from src.files.plain_yaml import dump_yaml, read_yaml
from src.files.text import read_json

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# settings that may differ between a run and its continuation
_FREE_ON_RESUME = {
    *("save_dir", "resume", "max_minutes", "eval_every", "eval_batches", "save_every", "log_every", "keep_checkpoints"),
    *("device", "precision", "compile", "shard", "num_workers", "num_proc", "cache_dir", "grad_accum", "max_skipped"),
    *("sample_prompt", "sample_tokens", "monitoring", "allow_changed_corpus"),
}
_SAID_BY_ITSELF = {"save_dir", "resume", "allow_changed_corpus"}
CORPUS = "corpus.json"


def start(folder: Path, settings: dict, lock: "RunLock | None" = None) -> "RunLock":
    """Make a run folder with its config.yaml, which `--config` takes back, and hold it (by `lock`, where that does).

    UserError where it cannot be written, or another run has begun there in the meantime."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if lock is None:
            lock = RunLock(folder)
            check_resume(folder, settings, resume=False)
        _write(folder / "config.yaml", dump_yaml(settings | dict.fromkeys({"resume"} & settings.keys(), False)))
    except OSError as error:
        raise UserError(f"cannot write to save_dir {folder}: {error.strerror}; choose another folder") from None
    return lock


def _write(path: Path, text: str):
    beside = path.with_name(f".{path.name}.writing")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def check_writable(folder: Path, flag: str = "save_dir"):
    """UserError where a run folder could not be made; makes nothing, as there may be other mistakes to tell first."""
    parent = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"cannot write to {flag} {folder}: {parent} is no writable folder; choose another folder")


def settings_of(folder: Path) -> dict:
    """The settings in a run folder's config.yaml; none where no run has begun.  UserError where it is broken."""
    path = folder / "config.yaml"
    settings = read_yaml(path) if path.exists() else {}
    if path.exists() and not settings:
        raise UserError(f"{path} is empty, and should hold the run's settings: mend it, or choose another save_dir")
    return settings


def check_resume(folder: Path, settings: dict, resume: bool):
    """Whether the run in a folder may go on with these settings: UserError where not, a line for each that changed."""
    if not (folder / "config.yaml").exists():
        if resume:
            raise UserError(f"--resume: save_dir {folder} holds no run: correct it, or begin one without --resume")
        return
    if not resume:
        raise UserError(f"save_dir {folder} holds a run: go on with --resume true, or choose another folder")
    before, free = settings_of(folder), set(_FREE_ON_RESUME)
    if (folder / CORPUS).exists():  # which knows the text wherever it lies, see check_corpus
        free |= {"train_paths", "valid_paths"}
    for name, new in settings.items():
        old = before.get(name)
        if old != new and name in before and name not in free:
            advice = f"resume with the same settings (--config {folder}/config.yaml) or choose another save_dir"
            raise UserError(f"--{name} is {new}, but the run in {folder} has {old}: {advice}")
        if old != new and name not in _SAID_BY_ITSELF:
            print(f"--{name} is {new}, and was {old} before", file=sys.stderr)


def corpus_changes(folder: Path, corpus: dict) -> list[str]:
    """What is no longer as `keep_corpus` saw it, in sentences; nothing where it was never called."""
    path = folder / CORPUS
    before = read_json(path) if path.exists() else {}
    try:
        return [change for part, now in corpus.items() for change in _changes(part, before.get(part, now), now)]
    except (AttributeError, TypeError, IndexError):
        raise UserError(f"{path} is broken: delete it, and the text is taken as it is") from None


def keep_corpus(folder: Path, corpus: dict):
    """Write down what text a run reads: {part: [(name, bytes, digest), ...], or a fingerprint}."""
    _write(folder / CORPUS, json.dumps(corpus) + "\n")


def _changes(part, before, now):
    if not isinstance(now, list) or not isinstance(before, list):
        return [f"the {part} has changed"] * (before != now)
    old, new = ({tuple(file): None for file in files} for files in (before, now))
    gone, come = ({file[0] for file in files} for files in (old.keys() - new.keys(), new.keys() - old.keys()))
    told = []
    for kind, names in (("added", come - gone), ("removed", gone - come), ("changed", come & gone)):
        told += [f"{part} files {kind}: {few(sorted(names))}"] * bool(names)
    return told or [f"{part} files come in another order"] * (list(old) != list(new))


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first: what is called step_NNNNNNNN and is one, whole or not."""
    named = [path for path in folder.glob("step_*") if re.fullmatch(r"step_\d+", path.name)]
    return sorted(path for path in named if path.is_dir() and any((path / name).exists() for name in FILES))


def _recover(folder: Path):
    """Clear away what a crash left while a checkpoint was written, or `last` or `best`."""
    for left in folder.glob(".*"):
        if found := re.fullmatch(r"\.(step_\d+|last|best)\.(writing|old)", left.name):
            folders.recover(folder / found[1])


def newest_whole(folder: Path):
    """(checkpoint folder, its state) of the newest step to go on from; None where a run has written none yet.

    A broken one is named on stderr, and the one before is taken. UserError where all are broken."""
    _recover(folder)
    found = checkpoints(folder)
    for path in reversed(found):
        try:
            return path, load_state(path)
        except UserError as error:
            print(f"{error}; going back to the checkpoint before", file=sys.stderr)
    if found:
        advice = "choose another save_dir; perhaps --init_from can still take weights from one"
        raise UserError(f"none of the checkpoints in {folder} can be read: {advice}")
    return None


class RunLock:
    """Holds a run folder for this process, until `release` or its end.  UserError where another process holds it.

    A lock of this process alone, which its loading processes do not inherit and keep."""

    def __init__(self, folder: Path):
        try:
            self.file = open(folder / ".lock", "a+", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise UserError(f"cannot hold save_dir {folder} by its .lock: {error.strerror}; correct that") from None
        try:
            if fcntl is not None:
                fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            else:  # nothing is inherited there, and a locked file cannot be read
                from filelock import FileLock

                self.held = FileLock(folder / ".lock.held", timeout=0)
                self.held.acquire()
        except (BlockingIOError, PermissionError, TimeoutError):  # by the system, each means that it is held
            self.file.seek(0)
            holder = self.file.read().strip() or "unknown"
            told = f"save_dir {folder} is in use by another run (process {holder}): wait for it, or choose another"
            raise UserError(told) from None
        self.file.truncate(0)
        self.file.write(f"{os.getpid()}\n")
        self.file.flush()

    def release(self):
        self.file.close()
        if fcntl is None:
            self.held.release()


def diverged(folder: Path, what: str) -> UserError:
    """The error of a run that cannot go on, as `what` says."""
    last = follow(folder / "last")
    last = last.resolve() if last.exists() else "none yet"
    return UserError(
        f"{what}; the last good checkpoint is {last}; try a smaller --lr, more --warmup_steps, or --precision fp32"
    )


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
    try:
        beside.symlink_to(target_name, target_is_directory=True)
    except (OSError, NotImplementedError):  # a system, or a disk, without links: see `follow`
        beside.write_text(f"{target_name}\n", encoding="utf-8")
    if link.is_dir() and not link.is_symlink():  # a copy that was made through the link
        _, aside = folders.recover(link)
        link.rename(aside)
        os.replace(beside, link)
        folders.remove(aside, FILES.__contains__)
        if aside.exists():
            aside.rename(kept := link.with_name(f"{link.name}_copy"))
            print(f"{link} was a folder of its own: what was yours in it is in {kept}", file=sys.stderr)
    else:
        os.replace(beside, link)


def prune(run_folder, keep: int):
    """Delete all but the newest `keep` checkpoints and the one that `best` leads to; files of the user's stay."""
    run_folder = Path(run_folder)
    _recover(run_folder)
    best = follow(run_folder / "best").resolve()
    for folder in checkpoints(run_folder)[:-keep]:
        if folder.resolve() != best:
            folders.remove(folder, FILES.__contains__)
