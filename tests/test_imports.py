"""What `import memmeta` loads: the core alone, and the other rooms with their packages later."""

import subprocess
import sys

import pytest

OTHER_FLOORS = {"filelock", "flax", "matplotlib", "orbax", "rich", "tyro"}


def loaded_by(code):
    """The packages in a fresh process after some lines of code."""
    program = f"import sys\n{code}\nprint(*sys.modules)"
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return {name.split(".")[0] for name in found.stdout.split()}


def test_the_core_loads_nothing_of_the_other_floors():
    loaded = loaded_by("import memmeta")
    assert {"jax", "memmeta", "optax"} <= loaded
    assert not loaded & OTHER_FLOORS


def test_few_shot_learning_loads_nothing_of_runs():
    loaded = loaded_by("import memmeta\nmemmeta.few_shot, memmeta.models, memmeta.algorithms")
    assert loaded & OTHER_FLOORS == {"flax"}


def test_an_unknown_room_is_an_attribute_error():
    import memmeta

    with pytest.raises(AttributeError, match="module 'memmeta' has no attribute 'nothing'"):
        memmeta.nothing  # noqa: B018
    assert set(memmeta.__all__) <= set(dir(memmeta))
