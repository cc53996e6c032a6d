"""What `import memmeta` loads: the core alone, and the other rooms with their packages later."""

import subprocess
import sys

import pytest

OTHER_FLOORS = {"filelock", "flax", "matplotlib", "orbax", "rich", "tyro"}
CORE = "import chex, jax, jaxtyping, numpy, optax"


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
