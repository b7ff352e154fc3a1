"""The pytest settings of pyproject.toml: a test that crashes or hangs ends the run and is named."""

import os
import re

import pytest
from scripts import ROOT, start


@pytest.mark.parametrize(
    ("name", "ending"), [("dies", "os.kill(os.getpid(), signal.SIGSEGV)"), ("blocks", "threading.Event().wait()")]
)
def test_a_test_that_dies_or_blocks_ends_the_run_by_name(tmp_path, name, ending):
    """It is in a file among others that still wait for a worker when it happens."""
    for other in (name, "a", "b", "c", "d", "e", "f"):
        tests = f"def test_before(): pass\ndef test_{other}(): {ending if other == name else 'pass'}\n"
        (tmp_path / f"test_{other}.py").write_text(f"import os, signal, threading\n{tests}def test_after(): pass\n")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    words = ["-c", ROOT / "pyproject.toml", "--rootdir", tmp_path, "-o", "faulthandler_timeout=1", tmp_path]
    child = start("-m", "pytest", "-p", "no:cacheprovider", *words, env=environment)
    try:
        out, err = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == 1
    assert re.search(rf"worker 'gw.' crashed while running '.*test_{name}\.py::test_{name}'", out)
    assert f'test_{name}.py", line 3 in test_{name}' in err  # the stack shows the line
