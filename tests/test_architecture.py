"""Arrows between rooms go one way, and nothing is pickled. Read from the syntax tree, so nothing is imported."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "tcc_jax"
MODULES = sorted(PACKAGE.rglob("*.py"))
COMMANDS = ("prepare", "train", "eval", "complete", "download", "export", "bench", "aot", "__main__")
# Each room may import those after it, and none before it. What no row names may be imported by all.
ROOMS = ("benchmarking", "evaluation", "completion", "training", "runs", "baselines", "model", "corpus")
# Rooms that stand beside each other.
APART = {("completion", "training"), ("evaluation", "training"), ("runs", "baselines"), ("model", "corpus")}
PLAIN = ("config", "terminal", "files", "storage")


def imports(path):
    """Yield the full name of everything a module imports, at its top or anywhere inside."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = path.relative_to(PACKAGE.parent).parts[: -node.level] if node.level else ()
            module = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def within(name, module):
    return name == module or name.startswith(module + ".")


def room(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def may_import(room, other):
    if room in PLAIN:
        return other not in ROOMS
    if room in COMMANDS or other not in ROOMS or room == other:
        return True
    return ROOMS.index(room) < ROOMS.index(other) and (room, other) not in APART


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_follow_the_arrows(path):
    here = room(path)
    for name in imports(path):
        other = name.removeprefix("tcc_jax.").partition(".")[0] if within(name, "tcc_jax") else ""
        assert here == "__init__" or may_import(here, other), f"{path} imports {name}"
        if here not in COMMANDS:
            assert other not in COMMANDS, f"{path} imports {name}"
        if here in (*PLAIN, "corpus"):
            assert not any(within(name, module) for module in ("jax", "jaxlib", "flax", "optax", "orbax")), name
        assert not any(
            within(name, module) for module in ("pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve")
        )


def test_no_array_is_loaded_with_pickle_allowed():
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                assert isinstance(node.value, ast.Constant) and node.value.value is False, path


def test_every_room_is_looked_at():
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert folders == set(ROOMS) and {room(path) for path in MODULES} >= {*folders, *PLAIN, *COMMANDS}
