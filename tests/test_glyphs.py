"""The embedded glyphs: what is in them, that they are whole, and how hard they are."""

import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memmeta
from memmeta.data import DataError, Episodes, load

SPLITS = ("train", "validation", "test")
PACKAGE = Path(memmeta.__file__).parent
FILES = Path("data") / "archives"


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
    assert (PACKAGE / FILES / "glyphs.npz").stat().st_size < 8_000_000


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


def pickled(content):
    file = io.BytesIO()
    np.savez(file, images=np.array([{}], dtype=object))
    return file.getvalue()


DAMAGES = {
    "truncated": lambda content: content[:-1],
    "empty": lambda content: b"",
    "one bit altered": lambda content: content[:500] + bytes([content[500] ^ 1]) + content[501:],
    "pickled": pickled,
}
MISSING = ("glyphs.npz", "glyphs.sha256")
PROGRAM = """
import json, shutil
from pathlib import Path
import memmeta.data
here = Path(__file__).parent
archives, found = here / "memmeta" / "data" / "archives", {}
for damaged in (here / "cases").iterdir():
    for name in ("glyphs.npz", "glyphs.sha256"):
        (archives / name).unlink(missing_ok=True)
    shutil.copytree(damaged, archives, dirs_exist_ok=True)
    try:
        memmeta.data.load("glyphs", "train")
    except memmeta.data.DataError as error:
        found[damaged.name] = str(error)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def refusals(tmp_path_factory):
    """What a copy of the package says of its archive: for each damage, and for each file missing.

    The pickled archive has a checksum that agrees with it.
    """
    root = tmp_path_factory.mktemp("damaged")
    shutil.copytree(PACKAGE, root / "memmeta", ignore=shutil.ignore_patterns("__pycache__"))
    whole = {name: (PACKAGE / FILES / name).read_bytes() for name in MISSING}
    cases = {name: whole | {"glyphs.npz": f(whole["glyphs.npz"])} for name, f in DAMAGES.items()}
    digest = hashlib.sha256(cases["pickled"]["glyphs.npz"]).hexdigest()
    cases["pickled"]["glyphs.sha256"] = digest.encode()
    cases |= {name: {n: c for n, c in whole.items() if n != name} for name in MISSING}
    for case, contents in cases.items():
        for name, content in contents.items():
            path = root / "cases" / case / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    (root / "program.py").write_text(PROGRAM)  # a script imports what lies beside it
    command = [sys.executable, str(root / "program.py")]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(said.stdout)


@pytest.mark.parametrize("damage", ["truncated", "empty", "one bit altered"])
def test_damaged_archive_is_refused(refusals, damage):
    assert re.search(r"^glyphs: .* truncated or altered.*reinstall", refusals[damage])
    assert "\n" not in refusals[damage]


@pytest.mark.parametrize("missing", MISSING)
def test_missing_file_is_named(refusals, missing):
    assert re.search(rf"^glyphs: cannot read .*{missing}.*reinstall", refusals[missing])


def test_pickled_objects_are_never_loaded(refusals):
    assert "no archive of plain arrays" in refusals["pickled"]
