"""What `import memmeta` loads, the core alone and the rest later; and what tests import of it."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

OTHER_FLOORS = {"filelock", "flax", "matplotlib", "orbax", "rich", "tyro"}
CORE = "import chex, jax, jaxtyping, numpy, optax"
TESTS = sorted(Path(__file__).parent.glob("*.py"))
NAMED_TUPLES = {"_asdict", "_fields", "_make", "_replace"}


def added_by(code, after=CORE):
    """The packages that a fresh process loads for some lines of code after others.

    JAX itself loads filelock, and flax rich: that is not of memmeta's doing.
    """
    lines = ["import sys", after, "before = set(sys.modules)", code]
    program = "\n".join([*lines, "print(*(set(sys.modules) - before))"])
    command = [sys.executable, "-c", program]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in found.stdout.split()}


def test_the_core_loads_nothing_of_the_other_floors():
    added = added_by("import memmeta")
    assert "memmeta" in added
    assert not added & OTHER_FLOORS


def test_few_shot_learning_adds_flax_alone():
    rooms = "import memmeta\nmemmeta.few_shot, memmeta.models, memmeta.algorithms"
    assert "flax" in added_by(rooms)
    assert not added_by(rooms, after=f"{CORE}, flax.linen") & OTHER_FLOORS


def test_an_unknown_room_is_an_attribute_error():
    import memmeta

    with pytest.raises(AttributeError, match="module 'memmeta' has no attribute 'nothing'"):
        memmeta.nothing  # noqa: B018
    assert set(memmeta.__all__) <= set(dir(memmeta))


@pytest.mark.parametrize(
    ("room", "name", "meant"),
    [
        ("memmeta", "meta_step", "make_meta_step"),
        ("memmeta.few_shot.algorithms", "mamll", "maml"),
        ("memmeta.hypergradient", "implict", "implicit"),
    ],
)
def test_a_name_that_is_nearly_right(room, name, meant):
    with pytest.raises(AttributeError, match=f"no attribute '{name}'. Did you mean '{meant}'"):
        getattr(importlib.import_module(room), name)


def is_private(name):
    return name.startswith("_") and not name.endswith("__")


def private_names(tree):
    """The private names that a program imports from memmeta, and any private attributes."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            paths = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            paths = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            found |= {node.attr} - NAMED_TUPLES
            continue
        else:
            continue
        ours = [path for path in paths if path.split(".")[0] == "memmeta"]
        found |= {path for path in ours if any(map(is_private, path.split(".")))}
    return found


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import memmeta._shared.trees", {"memmeta._shared.trees"}),
        ("from memmeta.data import _cache as cache, load", {"memmeta.data._cache"}),
        ("from memmeta.data._files import FileError", {"memmeta.data._files.FileError"}),
        ("step.compiled._cache_size()", {"_cache_size"}),
        ("from memmeta.__main__ import main\nmemmeta.__version__\ntask._replace(x=1)", set()),
    ],
)
def test_private_names_are_found(code, expected):
    assert private_names(ast.parse(code)) == expected


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.name)
def test_tests_read_no_private_name(path):
    found = private_names(ast.parse(path.read_text(encoding="utf-8")))
    assert not found
