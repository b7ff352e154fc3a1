"""Fuzzer: gives broken files to every loader, and reports all results other than a one-line error message.

    python tests/fuzz/fuzz.py 1000                             # number of inputs in total, spread over the loaders
    python tests/fuzz/fuzz.py 100000 --loaders gguf onnx       # only some loaders
    python tests/fuzz/fuzz.py --replay runs/fuzz/gguf-17       # load one input again and show its traceback

The fuzzer makes valid files, breaks each with a mutation that depends on (--seed, loader, number) alone, and loads it
in a forked process. Two results are right: the file loads and works, or a one-line UserError names the file. Anything
else is a finding, whose input is kept in --output: another exception, a crash, over 10 s, over 300 MB, execution of
code from the file, or wrong data that is accepted. Prints a table and one JSON line. The exit code is 1 if there are
findings.
"""

import argparse
import collections
import gc
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

from fuzz_formats import mutate  # noqa: E402
from fuzz_loaders import LOADERS, Silent  # noqa: E402

warnings.simplefilter("ignore")
SECONDS, MEGABYTES = 10, 300
WALL = 60  # limit in wall-clock seconds, for a process that waits and uses no processor time
CHUNK = 100  # inputs per forked process
KEPT = 3  # inputs to keep for each kind of finding
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect", "pty.spawn")


def make_input(seeds: dict, loader: str, number: int, seed: int) -> tuple[dict, str, str]:
    """Returns ({name: content} of a folder, name of the broken file, reason why it must be refused or "")."""
    rng = random.Random(f"{seed}/{loader}/{number}")
    files = dict(seeds[rng.choice(sorted(seeds))])
    kinds = {name: kind for name, kind in LOADERS[loader].files.items() if name in files}
    name = rng.choice(sorted(kinds))
    files[name], must_refuse = mutate(kinds[name], files[name], rng)
    return files, name, must_refuse


def write_input(folder: Path, files: dict):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def in_child(action) -> int:
    """Runs something in a forked process; returns its wait status, as os.waitpid does."""
    child = fork(action)
    return os.waitpid(child, 0)[1]


def fork(action) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        action()
        code = 0
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


# ---- one input, inside a child --------------------------------------------------------------------------------------


def megabytes(field: str) -> float:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field)) / 1000


def limit():
    """Limits this process, and returns a list that collects events which loading a file must never cause."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (int((megabytes("VmSize") + 2000) * 1e6),) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000_000,) * 2)
    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    os.fsync = lambda handle: None  # these files are temporary
    seen = []

    def hook(event, args):
        if event in FORBIDDEN or event == "import" and args[0] == "fuzz_marker":
            seen.append(f"{event} {args[0]!r:.80}")

    sys.addaudithook(hook)
    return seen


def outcome(loader: str, folder: Path, name: str, must_refuse: str, seen: list) -> dict:
    """Returns the result of loading a folder: {kind: ok, refused or a kind of finding; place; message; seconds; MB}."""
    seen.clear()
    out = open("output.txt" if not folder.name else f"{folder}.out", "w+b")  # noqa: SIM115
    os.dup2(out.fileno(), 1)
    os.dup2(out.fileno(), 2)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak memory
    base, start = megabytes("VmRSS"), time.process_time()
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.alarm(WALL)
    found = _load(loader, folder, name)
    signal.alarm(0)
    signal.setitimer(signal.ITIMER_PROF, 0)
    found |= {"seconds": time.process_time() - start, "MB": megabytes("VmHWM") - base}
    sys.stdout.flush()
    sys.stderr.flush()
    out.seek(0)
    said = out.read().decode(errors="replace")
    out.close()
    os.unlink(out.name)
    if seen:
        found |= {"kind": "code run", "place": seen[0], "message": "; ".join(seen)}
    elif found["kind"] in ("ok", "refused") and found["MB"] > MEGABYTES:
        found |= {"place": found["kind"], "kind": "memory", "message": f"{found['MB']:.0f} MB; {found['message']}"}
    elif found["kind"] == "ok" and must_refuse and Path(name).name not in said:
        found |= {"kind": "silent", "place": must_refuse, "message": must_refuse}
    elif found["kind"] in ("ok", "refused") and ("panicked" in said or "Traceback" in said):
        found |= {"kind": "noise", "place": "stderr", "message": said.strip()[:200]}
    elif found["kind"] == "exit" and said.count("error: ") == 1 and len(said) < 2000:
        found["kind"] = "refused"
    return found


def _load(loader, folder, name):
    from src.errors import UserError, one_line

    try:
        LOADERS[loader].use(folder)
        return {"kind": "ok", "place": "", "message": ""}
    except UserError as error:
        line = one_line(error)
        names_file = name.split("/")[0] in line or folder.name in line or LOADERS[loader].names_flags
        kind = "refused" if names_file and len(line) < 1000 else "long line" if names_file else "unnamed"
        return {"kind": kind, "place": _place(error), "message": line[:300]}
    except SystemExit as error:
        return {"kind": "exit" if error.code == 2 else "exception", "place": "SystemExit", "message": str(error.code)}
    except Silent as error:
        return {"kind": "silent", "place": str(error), "message": str(error)}
    except BaseException as error:  # noqa: BLE001
        return {"kind": "exception", "place": f"{type(error).__name__} {_place(error)}", "message": str(error)[:300]}


def _place(error) -> str:
    """Returns the innermost line of this project in an exception's traceback."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(f"{ROOT}/")]
    inside = [f for f in frames if "/src/" in f.filename] or frames[-1:]
    return f"{Path(inside[-1].filename).relative_to(ROOT)}:{inside[-1].lineno} {inside[-1].name}" if inside else "?"


def run_chunk(seeds, loader, numbers, seed, report: Path):
    """Loads inputs one after another. Writes a line to the report before each one, and its result after it."""
    seen = limit()
    with open(report, "w", buffering=1) as file:
        for number in numbers:
            file.write(f"{number}\n")
            signal.alarm(WALL)
            files, name, must_refuse = make_input(seeds, loader, number, seed)
            folder = Path(f"case-{loader.replace(' ', '_')}-{number}")
            write_input(folder, files)
            file.write(json.dumps(outcome(loader, folder, name, must_refuse, seen)) + "\n")
            shutil.rmtree(folder, ignore_errors=True)


# ---- all inputs -----------------------------------------------------------------------------------------------------


def make_seeds(loader: str, work: Path) -> dict:
    """Returns {seed: {name: content}} of a loader. A separate process makes them, so this one keeps no threads."""
    folder = work / "seeds" / loader.replace(" ", "_")
    folder.mkdir(parents=True)
    log = work / "seeds.txt"

    def make():
        os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), 2)
        os.dup2(2, 1)
        LOADERS[loader].make(folder)

    if in_child(make):
        raise SystemExit(f"no seeds for {loader}: {log.read_text()}")
    return {seed.name: read_folder(seed) for seed in sorted(folder.iterdir())}


def read_folder(folder: Path) -> dict:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def warm(loader, seeds):
    """Imports what a loader needs in this process by loading valid files. They must load."""
    seen = []
    for seed, files in seeds.items():
        folder = Path(f"whole-{loader.replace(' ', '_')}-{seed}")
        write_input(folder, files)
        saved = os.dup(1), os.dup(2)
        found = outcome(loader, folder, next(iter(files)), "", seen)
        os.dup2(saved[0], 1)
        os.dup2(saved[1], 2)
        if found["kind"] != "ok":
            raise SystemExit(f"{loader}: the valid file {seed} does not load: {found}")


def prepare(loaders, work) -> dict:
    """Returns {loader: its seeds}, after each has been loaded."""
    seeds = {name: make_seeds(name, work) for name in loaders}
    gc.freeze()  # imported objects need no garbage collection in the children
    for name in loaders:
        warm(name, seeds[name])
    gc.freeze()
    return seeds


def fuzz(seeds, total, seed, workers, work, tell) -> dict:
    """Returns {loader: list of (number, outcome)} for `total` inputs, spread evenly over the loaders."""
    each, found, running = -(-total // len(seeds)), {name: [] for name in seeds}, {}
    waiting = collections.deque((n, range(a, min(a + CHUNK, each))) for a in range(0, each, CHUNK) for n in seeds)
    while waiting or running:
        while waiting and len(running) < workers:
            name, numbers = waiting.popleft()
            report = work / f"report-{time.monotonic_ns()}"
            child = fork(lambda n=name, r=numbers, f=report: run_chunk(seeds[n], n, r, seed, f))
            running[child] = name, numbers, report
        child, status = os.waitpid(-1, 0)
        name, numbers, report = running.pop(child)
        lines = report.read_text().splitlines() if report.exists() else []
        report.unlink(missing_ok=True)
        found[name] += [(int(a), json.loads(b)) for a, b in zip(lines[::2], lines[1::2])]
        if status or len(lines) < 2 * len(numbers):  # the input that it was loading killed it
            died = numbers[min(len(lines) // 2, len(numbers) - 1)]
            found[name].append((died, _death(status)))
            if died + 1 < numbers.stop:
                waiting.appendleft((name, range(died + 1, numbers.stop)))
        tell(sum(map(len, found.values())))
    return found


def _death(status):
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    is_hang = number in (signal.SIGPROF, signal.SIGALRM)
    what = signal.Signals(number).name if number else f"exit code {os.waitstatus_to_exitcode(status)}"
    return {
        "kind": "hang" if is_hang else "crash",
        "place": what,
        "message": what,
        "seconds": SECONDS * is_hang,
        "MB": 0.0,
    }


def keep(found, seeds, seed, output: Path) -> list:
    """Saves inputs of findings. Returns the kinds of findings, most frequent first.

    Each one is (loader, kind, place, count, message, folder of an input)."""
    groups = collections.defaultdict(list)
    for name, results in found.items():
        for number, result in sorted(results, key=lambda pair: pair[0]):
            if result["kind"] not in ("ok", "refused"):
                groups[name, result["kind"], result["place"]].append((number, result))
    rows = []
    for (name, kind, place), results in sorted(groups.items(), key=lambda item: -len(item[1])):
        for number, result in results[:KEPT]:
            folder = output / f"{name.replace(' ', '_')}-{number}"
            files, broken, must_refuse = make_input(seeds[name], name, number, seed)
            shutil.rmtree(folder, ignore_errors=True)
            write_input(folder / "input", files)
            facts = {"loader": name, "file": broken, "must_refuse": must_refuse} | result
            (folder / "finding.json").write_text(json.dumps(facts, indent=1) + "\n")
        rows.append(
            (name, kind, place, len(results), results[0][1]["message"], f"{name.replace(' ', '_')}-{results[0][0]}")
        )
    return rows


def replay(path: Path, work):
    """Loads a saved input again in this process, with all its output."""
    folder = path if path.is_dir() else path.parent
    folder = next(p for p in (folder, *folder.parents) if (p / "finding.json").exists())
    facts = json.loads((folder / "finding.json").read_text())
    print(json.dumps(facts, indent=1))
    shutil.copytree(folder / "input", work / "case")
    os.chdir(work)
    resource.setrlimit(resource.RLIMIT_AS, (int((megabytes("VmSize") + 4000) * 1e6),) * 2)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.signal(signal.SIGPROF, signal.default_int_handler)
    start = time.process_time()
    LOADERS[facts["loader"]].use(Path("case"))
    print(f"loaded in {time.process_time() - start:.2f} s; peak memory {megabytes('VmHWM'):.0f} MB")


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("total", nargs="?", type=int, default=20 * len(LOADERS), help="number of inputs in total")
    parser.add_argument("--loaders", nargs="+", choices=list(LOADERS), default=list(LOADERS), metavar="NAME")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "fuzz", help="folder for the inputs of findings")
    parser.add_argument("--replay", type=Path, help="folder of a finding")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as work:
        work = Path(work)
        if args.replay:
            return replay(args.replay.resolve(), work)
        output, start = args.output.resolve(), time.monotonic()
        os.chdir(work)
        tell = lambda done: print(f"\r{done:,} inputs", end="", file=sys.stderr) if sys.stderr.isatty() else None  # noqa: E731
        seeds = prepare(args.loaders, work)
        print(f"valid files made in {time.monotonic() - start:.1f} s", file=sys.stderr)
        found = fuzz(seeds, args.total, args.seed, args.workers, work, tell)
        rows = keep(found, seeds, args.seed, output)
        os.chdir(ROOT)
    return show(found, rows, time.monotonic() - start, output)


def show(found, rows, seconds, output) -> int:
    print(f"{'loader':16}{'inputs':>8}{'ok':>8}{'refused':>9}{'findings':>9}{'s':>8}{'ms each':>9}{'peak MB':>9}")
    table = []
    for name, results in found.items():
        kinds = collections.Counter(result["kind"] for _, result in results)
        spent, peak = sum(r["seconds"] for _, r in results), max(r["MB"] for _, r in results)
        bad = len(results) - kinds["ok"] - kinds["refused"]
        table.append({"loader": name, "inputs": len(results), "ok": kinds["ok"], "refused": kinds["refused"]})
        table[-1] |= {"findings": bad, "seconds": round(spent, 1), "MB": round(peak)}
        print(f"{name:16}{len(results):8}{kinds['ok']:8}{kinds['refused']:9}{bad:9}{spent:8.1f}", end="")
        print(f"{1000 * spent / len(results):9.1f}{peak:9.0f}")
    for name, kind, place, number, message, folder in rows:
        print(f"{name}: {kind} x {number}, {place}: {message[:160]!r}  [{folder}]")
    print(f"{len(rows)} kinds of findings" + (f"; their inputs are in {output}" if rows else ""))
    total = {"inputs": sum(map(len, found.values())), "findings": sum(t["findings"] for t in table)}
    print(json.dumps(total | {"seconds": round(seconds, 1), "loaders": table}))
    return 1 if rows else 0


if __name__ == "__main__":
    sys.exit(main())
