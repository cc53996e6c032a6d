"""The embedded glyphs: what is in them, that they are whole, and how hard they are."""

import hashlib
import unicodedata

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memmeta.data import DataError, Episodes, load
from memmeta.data import _archive as archive

SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def splits():
    return {split: load("glyphs", split) for split in SPLITS}


def test_size_and_layout(splits):
    assert sum(len(dataset.class_names) for dataset in splits.values()) >= 1700
    for dataset in splits.values():
        assert dataset.inputs.shape == (len(dataset.class_names), 20, 28, 28, 1)
        assert dataset.inputs.dtype == jnp.uint8
        assert set(np.unique(dataset.inputs)) == set(range(0, 256, 17))
        assert (np.asarray(dataset.count) == 20).all()
        assert set(np.unique(dataset.group)) == set(range(len(dataset.group_names)))
    assert (archive.ARCHIVES / "glyphs.npz").stat().st_size < 8_000_000


def test_no_character_and_no_script_is_in_two_splits(splits):
    characters = [name for dataset in splits.values() for name in dataset.class_names]
    scripts = [name for dataset in splits.values() for name in dataset.group_names]
    assert len(set(characters)) == len(characters)
    assert len(set(scripts)) == len(scripts) == 21


def test_every_character_belongs_to_its_script(splits):
    for dataset in splits.values():
        for name, group in zip(dataset.class_names, np.asarray(dataset.group), strict=True):
            title = unicodedata.name(chr(int(name[2:], 16)))
            script = dataset.group_names[group].upper()
            assert script in title or (script == "LATIN" and title.startswith("DIGIT")), title


def test_no_two_characters_of_a_script_look_the_same(splits):
    for dataset in splits.values():
        images = np.asarray(dataset.inputs).reshape(len(dataset.class_names), 20, -1)
        assert (images.max(axis=-1) == 255).all()  # and none is blank
        for group in range(len(dataset.group_names)):
            alike = images[np.asarray(dataset.group) == group]
            different = [len({row.tobytes() for row in alike[:, style]}) for style in range(20)]
            assert np.mean(different) > 0.97 * len(alike)


def test_every_script_has_two_families_for_cross_family_episodes(splits):
    for dataset in splits.values():
        Episodes(ways=20, shots=1, queries=9, cross_family=True).check(dataset)
        for family in np.asarray(dataset.family):
            assert np.sort(np.bincount(family, minlength=3)).tolist() in ([0, 10, 10], [0, 9, 11])


@pytest.mark.parametrize(("cross_family", "expected"), [(False, 72.0), (True, 70.0)])
def test_nearest_neighbour_of_raw_pixels(splits, cross_family, expected):
    """How hard the test split is: measured 5-way 1-shot accuracy, to within its sampling error."""
    episodes = Episodes(ways=5, shots=1, queries=9, cross_family=cross_family)

    @jax.jit
    def accuracy(dataset, key):
        task = episodes.sample_batch(dataset, key, 500)
        support = task.support_inputs.reshape(500, 5, -1).astype(jnp.float32)
        query = task.query_inputs.reshape(500, 45, -1).astype(jnp.float32)
        products = jnp.einsum("tqd,tsd->tqs", query, support)
        distance = (support**2).sum(axis=-1)[:, None] - 2 * products
        return 100 * (distance.argmin(axis=-1) == task.query_targets).mean()

    assert abs(accuracy(splits["test"], jax.random.key(0)) - expected) < 2.0


def test_unknown_names_are_answered_with_the_known_ones():
    with pytest.raises(DataError, match=r"unknown data set 'glyfs': choose one of glyphs"):
        load("glyfs", "train")
    with pytest.raises(
        DataError, match=r"unknown split 'dev' of glyphs: .* train, validation, test"
    ):
        load("glyphs", "dev")


def damage(folder, monkeypatch, change):
    """Ship a damaged copy of the archive instead of the real one."""
    content = (archive.ARCHIVES / "glyphs.npz").read_bytes()
    checksum = (archive.ARCHIVES / "glyphs.sha256").read_text()
    (folder / "glyphs.npz").write_bytes(change(content))
    (folder / "glyphs.sha256").write_text(checksum)
    monkeypatch.setattr(archive, "ARCHIVES", folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content[:-1],
        lambda content: b"",
        lambda content: content[:500] + bytes([content[500] ^ 1]) + content[501:],
    ],
    ids=["truncated", "empty", "one bit altered"],
)
def test_damaged_archive_is_refused(tmp_path, monkeypatch, change):
    damage(tmp_path, monkeypatch, change)
    with pytest.raises(DataError, match=r"^glyphs: .* truncated or altered.*reinstall") as error:
        load("glyphs", "train")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("missing", ["glyphs.npz", "glyphs.sha256"])
def test_missing_file_is_named(tmp_path, monkeypatch, missing):
    damage(tmp_path, monkeypatch, lambda content: content)
    (tmp_path / missing).unlink()
    with pytest.raises(DataError, match=rf"^glyphs: cannot read .*{missing}.*reinstall"):
        load("glyphs", "train")


def test_pickled_objects_are_never_loaded(tmp_path):
    np.savez(tmp_path / "objects.npz", images=np.array([{}], dtype=object))
    digest = hashlib.sha256((tmp_path / "objects.npz").read_bytes()).hexdigest()
    (tmp_path / "objects.sha256").write_text(digest)
    with pytest.raises(DataError, match="no archive of plain arrays"):
        archive.read_archive("objects", tmp_path)
