"""The embedded emoji: what is in them, that support and query are apart, and how hard they are."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memmeta.data
from memmeta.data import Episodes, load

SPLITS = ("train", "validation", "test")
FILE = Path(memmeta.data.__file__).parent / "archives" / "emoji.npz"


@pytest.fixture(scope="module")
def splits():
    return {split: load("emoji", split) for split in SPLITS}


def test_size_and_layout(splits):
    assert sum(len(dataset.class_names) for dataset in splits.values()) >= 1000
    assert FILE.stat().st_size < 6_000_000
    for dataset in splits.values():
        assert dataset.inputs.shape == (len(dataset.class_names), 12, 32, 32, 3)
        assert dataset.inputs.dtype == jnp.uint8
        assert set(np.unique(dataset.inputs)) == {level * 255 // 31 for level in range(32)}
        np.testing.assert_array_equal(dataset.inputs[:, 6:], dataset.inputs[:, :6, :, ::-1])
        assert set(np.unique(dataset.group)) == set(range(len(dataset.group_names)))


def test_no_concept_and_no_group_is_in_two_splits(splits):
    for field in ("class_names", "group_names"):
        names = [name for dataset in splits.values() for name in getattr(dataset, field)]
        assert len(set(names)) == len(names)


def test_no_two_concepts_of_a_design_look_the_same(splits):
    pictures = np.concatenate([np.asarray(dataset.inputs[:, :6]) for dataset in splits.values()])
    for design in pictures.swapaxes(0, 1):
        assert len({picture.tobytes() for picture in design}) == len(design)
        assert (design.reshape(len(design), -1).std(1) > 0).all()  # and none is blank


def test_the_papers_tasks_can_be_drawn_without_a_design_on_both_sides(splits):
    for dataset in splits.values():
        Episodes(ways=5, shots=5, queries=5, cross_family=True).check(dataset)
        assert (np.asarray(dataset.family) == [0, 0, 0, 1, 1, 1] * 2).all()


@pytest.mark.parametrize(("cross_family", "expected"), [(False, 61.8), (True, 60.3)])
def test_nearest_neighbour_of_raw_pixels(splits, cross_family, expected):
    """How hard the test split is: measured 5-way 1-shot accuracy, to within its sampling error."""
    episodes = Episodes(ways=5, shots=1, queries=5, cross_family=cross_family)

    @jax.jit
    def accuracy(dataset, key):
        task = episodes.sample_batch(dataset, key, 500)
        support = task.support_inputs.reshape(500, 5, -1).astype(jnp.float32)
        query = task.query_inputs.reshape(500, 25, -1).astype(jnp.float32)
        products = jnp.einsum("tqd,tsd->tqs", query, support)
        distance = (support**2).sum(axis=-1)[:, None] - 2 * products
        return 100 * (distance.argmin(axis=-1) == task.query_targets).mean()

    assert abs(accuracy(splits["test"], jax.random.key(0)) - expected) < 2.0
