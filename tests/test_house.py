"""The structure of src/: the core imports no optional part, there is no circle of imports, private names stay in their
file, and files and functions are short."""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Optional parts: the core must work without them.
WINGS = ("src.tasks", "src.rag", "src.onnx", "src.interop", "src.page", "src.evaluation.harness")
MOST_LINES, MOST_LINES_OF_MODEL, MOST_LINES_OF_FUNCTION = 400, 450, 60


@cache
def sources() -> dict[str, ast.Module]:
    """Returns {module name, such as src.tasks.finetune: syntax tree}."""
    paths = [path for path in sorted((ROOT / "src").rglob("*.py")) if path.name != "__init__.py"]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths]
    return {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in zip(names, paths)}


def imports_of(tree: ast.AST, modules) -> set[str]:
    """Returns the modules of src that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are written in full"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found & set(modules)


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Returns a path from a module back to itself, for each module that has such a path."""
    found = []
    for start in graph:
        paths, seen = [[start]], set()
        while paths:
            path = paths.pop()
            for following in sorted(graph.get(path[-1], ())):
                if following == start:
                    found.append([*path, start])
                    paths = []
                    break
                if following not in seen:
                    seen.add(following)
                    paths.append([*path, following])
    return found


def privates(tree: ast.AST) -> set[str]:
    """Returns the private names (one leading underscore) of a file's functions, methods, classes and attributes."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return {name for name in found if name.startswith("_") and not name.startswith("__")}


def foreign_privates(trees: dict[str, ast.AST]) -> list[tuple[str, str]]:
    """Returns (file, name) for each use of a private name that only other files define."""
    everyone, found = set().union(*map(privates, trees.values())), []
    for module, tree in trees.items():
        foreign = everyone - privates(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr in foreign:
                found.append((module, node.attr))
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("src"):
                found += [(module, alias.name) for alias in node.names if alias.name in foreign]
    return sorted(set(found))


def wing_of(module: str) -> str | None:
    """Returns the optional part that a module such as src.onnx.graph belongs to, or None for the core."""
    return next((wing for wing in WINGS if f"{module}.".startswith(f"{wing}.")), None)


def test_the_core_imports_no_wing():
    trees = sources()
    core = [module for module in trees if wing_of(module) is None]
    assert [(m, i) for m in core for i in imports_of(trees[m], trees) if wing_of(i)] == []
    assert {wing_of(module) for module in trees} == {*WINGS, None}, "a part is gone: remove it from WINGS"


def test_there_is_no_circle_of_imports():
    trees = sources()
    assert circles({module: imports_of(tree, trees) for module, tree in trees.items()}) == []


def test_no_file_calls_what_another_file_calls_private():
    """Calling a private method of an object that was passed in ties two files together without an import."""
    assert foreign_privates(sources()) == []


def test_files_and_functions_are_short():
    for module, tree in sources().items():
        lines = len((ROOT / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8").splitlines())
        assert lines <= (MOST_LINES_OF_MODEL if module == "src.model" else MOST_LINES), module
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert node.end_lineno - node.lineno < MOST_LINES_OF_FUNCTION, (module, node.name)


@pytest.mark.parametrize(
    ("graph", "expected"),
    [
        ({"a": {"b"}, "b": {"c"}, "c": set()}, []),
        ({"a": {"b"}, "b": {"c"}, "c": {"b"}}, [["b", "c", "b"], ["c", "b", "c"]]),
        ({"a": {"a"}}, [["a", "a"]]),
    ],
    ids=["line", "circle behind a door", "itself"],
)
def test_circles_are_found(graph, expected):
    assert circles(graph) == expected


def test_imports_and_private_names_are_found():
    one = ast.parse("def f():\n    from src.b import g, _h\n    import src.c\ndef _own(): pass\nself._x = 1\n")
    two = ast.parse("from src import a\ndef _h(): pass\na.f()._own()\nself._x\n")
    assert imports_of(one, {"src.a", "src.b", "src.c"}) == {"src.b", "src.c"}
    assert imports_of(two, {"src.a", "src.b"}) == {"src.a"}
    assert foreign_privates({"src.a": one, "src.b": two}) == [("src.a", "_h"), ("src.b", "_own"), ("src.b", "_x")]
