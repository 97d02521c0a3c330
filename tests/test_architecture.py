"""Arrows between rooms go one way, and nothing is pickled. Read from the syntax tree, so nothing is imported."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "tcc_jax"
MODULES = sorted(PACKAGE.rglob("*.py"))
COMMANDS = ("prepare", "train", "eval", "complete", "download", "export", "bench", "aot", "__main__")
# What modules of a room must not import, but for the modules excepted.
FORBIDDEN = {
    "config": (["corpus", "model", "training", "completion"], []),
    "terminal": (["corpus", "model", "training", "completion"], []),
    "files": (["corpus", "model", "training", "completion"], []),
    "storage": (["corpus", "model", "training", "completion"], []),
    "corpus": (["model", "training", "completion"], []),
    "model": (["corpus", "training", "completion"], []),
    "training": (["completion", "benchmarking"], []),
    "completion": (["training", "benchmarking"], ["training.checkpoint"]),
}


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


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_follow_the_arrows(path):
    forbidden, excepted = FORBIDDEN.get(room(path), ([], []))
    for name in imports(path):
        for other in forbidden:
            if within(name, f"tcc_jax.{other}"):
                assert any(within(name, f"tcc_jax.{module}") for module in excepted), f"{path} imports {name}"
        if room(path) not in COMMANDS:
            assert not any(within(name, f"tcc_jax.{command}") for command in COMMANDS), f"{path} imports {name}"
        if room(path) in ("corpus", "config", "terminal", "files", "storage"):
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
    assert {room(path) for path in MODULES} >= {"config", "corpus", "model", "training", "completion"}
