"""Run folders: config.yaml, `step_NNNNNNNN/` checkpoints, the links `last` and `best`, and a lock for one process.

A run folder can be moved or copied, with or without its links, because every file in it is looked up relative to the
folder. On systems without symbolic links (Windows, for most users), `last` and `best` are text files with the name of
the checkpoint.
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
from src.files.text import parse_json, read_text

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# a resumed run may change these settings
_FREE_ON_RESUME = {
    *("save_dir", "resume", "max_minutes", "eval_every", "eval_batches", "save_every", "log_every", "keep_checkpoints"),
    *("device", "precision", "compile", "shard", "num_workers", "num_proc", "cache_dir", "grad_accum", "max_skipped"),
    *("sample_prompt", "sample_tokens", "monitoring", "allow_changed_corpus"),
}
_CHANGE_IS_OBVIOUS = {"save_dir", "resume", "allow_changed_corpus"}  # a change of one of these is not printed
CORPUS = "corpus.json"
CONTINUE = "continue with --resume true"  # the end of what a run says when a signal has ended it


def start(folder: Path, settings: dict, lock: "RunLock | None" = None) -> "RunLock":
    """Make a run folder, lock it, and write its config.yaml, which `--config` can read.  Returns the lock.

    lock: the lock of this folder, if the caller already holds it. Raises UserError if the folder cannot be written, or
    if another run has started there in the meantime."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if lock is None:
            lock = RunLock(folder)
            check_resume(folder, settings, resume=False)
        if "resume" in settings:  # it belongs to one start of the run, not to the run
            settings = settings | {"resume": False}
        folders.replace_file(folder / "config.yaml", dump_yaml(settings))
    except OSError as error:
        raise UserError(f"cannot write to save_dir {folder}: {error.strerror}; choose another folder") from None
    return lock


def check_writable(folder: Path, flag: str = "save_dir"):
    """Raises UserError if a run folder cannot be made here.

    The folder itself is made later, because another setting may still be wrong, and a start that fails should leave no
    folder behind."""
    parent = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"cannot write to {flag} {folder}: {parent} is not a writable folder; choose another folder")


def settings_of(folder: Path) -> dict:
    """Returns the settings in a run folder's config.yaml; {} if no run has started there.

    Raises UserError if the file is broken."""
    path = folder / "config.yaml"
    settings = read_yaml(path) if path.exists() else {}
    if path.exists() and not settings:
        raise UserError(f"{path} is empty, but should hold the run's settings: restore it, or choose another save_dir")
    return settings


def check_resume(folder: Path, settings: dict, resume: bool, defaults: dict | None = None, inputs=None):
    """Check that a run may start in this folder, or continue there if `resume` is true.

    inputs: {setting: words} for those that are fingerprints of what a run reads, and no flags.
    Prints the settings that have changed since the run started. Raises UserError if a setting has changed that must
    stay the same, if the folder holds no run to resume, or if it holds a run and `resume` is false."""
    if not (folder / "config.yaml").exists():
        if resume:
            raise UserError(f"--resume: save_dir {folder} holds no run: correct it, or start one without --resume")
        return
    if not resume:
        raise UserError(f"save_dir {folder} holds a run: continue it with --resume true, or choose another folder")
    before, free = settings_of(folder), set(_FREE_ON_RESUME)
    before = (defaults or {}) | before  # a run that is older than a setting had its default
    if (folder / CORPUS).exists():  # the files may have moved: `corpus_changes` compares their content
        free |= {"train_paths", "valid_paths"}
    for name, new in settings.items():
        old = before.get(name)
        if old != new and name in before and name in (inputs or {}):
            problem = f"{inputs[name]} changed after the run in {folder} started"
            raise UserError(f"{problem}: restore the old one, or choose another save_dir")
        if old != new and name in before and name not in free:
            with_file = "" if inputs else f" (--config {folder}/config.yaml)"
            advice = f"resume with the same settings{with_file} or choose another save_dir"
            raise UserError(f"--{name} is {new}, but the run in {folder} has {old}: {advice}")
        if old != new and name not in _CHANGE_IS_OBVIOUS:
            print(f"--{name} is {new}, and was {old} before", file=sys.stderr)


def corpus_changes(folder: Path, corpus: dict) -> list[str]:
    """Compares a run's data with its corpus.json. Returns each change as a phrase, such as `tokenizer changed`.

    corpus: the data as it is now, in the form that `keep_corpus` takes. Returns [] if the run has no corpus.json.
    Raises UserError if that file is broken."""
    path = folder / CORPUS
    # not read_json: older runs wrote names that are not UTF-8 as escapes that it refuses
    before = parse_json(read_text(path), path) if path.exists() else {}
    try:
        return [change for part, now in corpus.items() for change in _changes(part, before.get(part, now), now)]
    except (AttributeError, TypeError, IndexError):
        raise UserError(f"{path} is broken: delete it to accept the data as it is now") from None


def check_corpus(folder: Path, corpus: dict, what: str, may_change: bool):
    """Print the changes that `corpus_changes` finds on stderr.

    what: "text" or "puzzles", for the message. Raises UserError if there are changes and may_change is false."""
    changes = corpus_changes(folder, corpus)
    if changes and not may_change:
        problem = f"the {what} changed after the run in {folder} started ({'; '.join(changes)})"
        advice = f"restore the old {what}, or continue with the changed {what} by --allow_changed_corpus true"
        raise UserError(f"{problem}: {advice}")
    if changes:
        print(f"the run continues with changed {what}: {'; '.join(changes)}", file=sys.stderr)


def keep_corpus(folder: Path, corpus: dict):
    """Write corpus.json, which records what a run was trained on.

    corpus: {part: the files of the part as [(name, bytes, digest), ...], or one fingerprint as a string}."""
    folders.replace_file(folder / CORPUS, json.dumps(corpus) + "\n")


def _changes(part, before, now):
    """Returns a phrase for each change in one part of the corpus, such as `train files changed: b.jsonl`."""
    if not isinstance(now, list) or not isinstance(before, list):  # a fingerprint, such as the tokenizer's
        return [f"{part} changed"] if before != now else []
    old = list(dict.fromkeys(tuple(file) for file in before))
    new = list(dict.fromkeys(tuple(file) for file in now))
    only_old = {file[0] for file in set(old) - set(new)}
    only_new = {file[0] for file in set(new) - set(old)}
    kinds = {"added": only_new - only_old, "removed": only_old - only_new, "changed": only_new & only_old}
    changes = []
    for kind, names in kinds.items():
        if names:
            changes.append(f"{part} files {kind}: {few(sorted(names))}")
    if not changes and old != new:
        changes.append(f"{part} files come in another order")
    return changes


def checkpoints(folder: Path) -> list[Path]:
    """Returns the checkpoints of a run, oldest first, even incomplete ones.

    A checkpoint is a folder named step_NNNNNNNN that contains at least one of a checkpoint's files."""
    named = [path for path in folder.glob("step_*") if re.fullmatch(r"step_\d+", path.name)]
    return sorted(path for path in named if path.is_dir() and any((path / name).exists() for name in FILES))


def _recover(folder: Path):
    """Clean up if a crash interrupted the writing of a checkpoint, of `last` or of `best`."""
    for left in folder.glob(".*"):
        if found := re.fullmatch(r"\.(step_\d+|last|best)\.(writing|old)", left.name):
            folders.recover(folder / found[1])


def newest_whole(folder: Path):
    """Returns (folder, state) of the newest checkpoint that can be read, or None if the run has written none yet.

    If a checkpoint is broken, prints why and tries the one before. Raises UserError if all are broken."""
    _recover(folder)
    found = checkpoints(folder)
    for path in reversed(found):
        try:
            return path, load_state(path)
        except UserError as error:
            print(f"{error}; going back to the checkpoint before", file=sys.stderr)
    if found:
        advice = "choose another save_dir; --init_from may still be able to read the weights of one"
        raise UserError(f"none of the checkpoints in {folder} can be read: {advice}")
    return None


class RunLock:
    """Locks a run folder until `release` or the end of the process. Raises UserError if another process holds it.

    It uses lockf rather than flock, because child processes do not inherit a lockf lock. A loading process that
    outlives its run therefore does not keep the folder locked."""

    def __init__(self, folder: Path):
        try:
            self.file = open(folder / ".lock", "a+", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            problem = f"cannot lock save_dir {folder} by its .lock: {error.strerror}"
            raise UserError(f"{problem}; make that file writable") from None
        try:
            if fcntl is not None:
                fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            else:  # Windows: a locked file cannot be read, so the lock needs a second file
                from filelock import FileLock

                self.held = FileLock(folder / ".lock.held", timeout=0)
                self.held.acquire()
        except (BlockingIOError, PermissionError, TimeoutError):  # another process has the lock
            self.file.seek(0)
            holder = self.file.read().strip() or "unknown"
            problem = f"save_dir {folder} is in use by another run (process {holder})"
            raise UserError(f"{problem}: wait until it ends, or choose another folder") from None
        self.file.truncate(0)
        self.file.write(f"{os.getpid()}\n")
        self.file.flush()

    def release(self):
        self.file.close()
        if fcntl is None:
            self.held.release()


def diverged(folder: Path, problem: str) -> UserError:
    """Returns the UserError for a run that has diverged.  problem: what happened, and at which step."""
    last = follow(folder / "last")
    last = last.resolve() if last.exists() else "none yet"
    advice = "try a smaller --lr, more --warmup_steps, or --precision fp32"
    return UserError(f"{problem}; the last good checkpoint is {last}; {advice}")


def save(folder: Path, name: str, best: bool, keep: int, *checkpoint):
    """Write a checkpoint, point `last` to it (if `best` is true, `best` as well), and delete old checkpoints.

    name: step_NNNNNNNN. keep: how many of the newest checkpoints stay. checkpoint: the arguments of `save_checkpoint`
    after the folder. Raises UserError if the checkpoint cannot be written."""
    if not folder.is_dir():  # creating it again would hide that the older checkpoints are lost
        raise UserError(f"save_dir {folder} vanished during the run with all its checkpoints: find what removed it")
    save_checkpoint(folder / name, *checkpoint)
    try:
        for link in ("best", "last") if best else ("last",):
            point(folder / link, name)
        prune(folder, keep, name)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; its checkpoints are intact") from None


def link_again(folder: Path, checkpoint: Path, state: dict):
    """Point `last` to the newest checkpoint, and `best` too if it was the best: a crash may have come in between.

    state: the checkpoint's; is_best is what `save` got as `best`."""
    for link in ("best", "last") if state.get("is_best") else ("last",):
        if follow(folder / link).resolve() != checkpoint.resolve():
            point(folder / link, checkpoint.name)


def forget_best(folder: Path):
    """Remove the link `best`, so that the run stands for its newest checkpoint until one is the best again."""
    if (link := folder / "best").is_symlink() or link.is_file():  # a copy of the run may have a folder instead
        link.unlink()


def point(link, target_name: str):
    """Point run_folder/last or run_folder/best to a checkpoint in the same run folder, in one atomic step."""
    link = Path(link)
    beside = link.with_name(f".{link.name}.link")
    beside.unlink(missing_ok=True)
    try:
        beside.symlink_to(target_name, target_is_directory=True)
    except (OSError, NotImplementedError):  # there are no symbolic links here: `follow` reads this file
        beside.write_text(f"{target_name}\n", encoding="utf-8")
    if link.is_dir() and not link.is_symlink():  # a copy of the run folder may have a real folder in place of the link
        _, aside = folders.recover(link)
        link.rename(aside)
        os.replace(beside, link)
        folders.remove(aside, FILES.__contains__)
        if aside.exists():
            aside.rename(kept := link.with_name(f"{link.name}_copy"))
            print(f"{link} was a folder, not a link; your own files from it are now in {kept}", file=sys.stderr)
    else:
        os.replace(beside, link)


def prune(run_folder, keep: int, newest: str | None = None):
    """Delete all checkpoints except the newest `keep` and the best one.

    newest: name of the newest one. Later ones are broken, and the run went back before them: they do not count, and
    stay until the run has passed them. Files in their folders that are not a checkpoint's stay."""
    run_folder = Path(run_folder)
    _recover(run_folder)
    best = follow(run_folder / "best").resolve()
    for folder in [path for path in checkpoints(run_folder) if newest is None or path.name <= newest][:-keep]:
        if folder.resolve() != best:
            folders.remove(folder, FILES.__contains__)
