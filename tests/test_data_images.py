"""What folders of images must not lose: their splits, what is drawn, small classes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_data_folders import PICTURE, SPLITS, converted, make_tree, write_classes, write_image

from memmeta.data import DataError, Dataset, Episodes, Reading, load, load_host

Image = pytest.importorskip("PIL.Image", reason="the extra [images] is not installed")


@pytest.mark.parametrize(
    "names", [("Train", "Val", "Test"), ("TRAINING", "Valid", "testing"), ("train", "VAL", "Test")]
)
def test_names_of_splits_are_matched_without_case(names, tmp_path):
    make_tree(tmp_path, names)
    for name, split in zip(names, SPLITS, strict=True):
        assert load_host("folder", split, tmp_path).index.class_names == (f"{name}-a", f"{name}-b")


@pytest.mark.parametrize(("other", "missing"), [("test", "validation"), ("val", "test")])
def test_two_splits_are_enough(other, missing, tmp_path, caplog):
    write_classes(tmp_path / "Train", [f"class {n}" for n in range(10)], examples=1)
    write_classes(tmp_path / other, ["x", "y"], examples=1)
    found = {split: load_host("folder", split, tmp_path).index.class_names for split in SPLITS}
    assert [len(found[split]) for split in ("train", missing)] == [8, 2]
    assert set(found["train"]) | set(found[missing]) == {f"class {n}" for n in range(10)}
    assert set(found.values()) - {found["train"], found[missing]} == {("x", "y")}
    assert f"there is no {missing} split, so 2 of the 10 classes of train are it" in caplog.text


def only_train(root):
    write_classes(root / "train", ["a", "b", "c"])
    return "found the splits train alone"


def no_train(root):
    make_tree(root)
    for folder in (root / "train").iterdir():
        folder.rename(root / "val" / folder.name)
    (root / "train").rmdir()
    return "found the splits validation, test alone"


def a_fourth(root):
    make_tree(root)
    write_classes(root / "holdout", ["a"])
    return "holdout stands where splits stand"


def a_list_of_another_name(root):
    write_classes(root, ["a", "b", "c"])
    (root / "train_list.csv").write_text("filename,label\n")
    return "train_list.csv stands where splits stand"


def twice(root):
    make_tree(root)
    write_classes(root / "Train", ["c"])
    return "Train and train are both its train split"


def other_names(root):
    write_classes(root / "train_images", ["a", "b"])
    write_classes(root / "test_images", ["c", "d"], start=2)
    return "'test_images' looks like a split"


def one_level_down(root):
    make_tree(root / "pets")
    return "'test' looks like a split"


def without_classes(root):
    for number, split in enumerate(("train", "val", "test")):
        write_classes(root, [split], start=number)
    return "is in no class folder"


def two_without_classes(root):
    write_classes(root, ["train_2017", "test_2017", "more"])
    return "'test_2017' looks like a split"


@pytest.mark.parametrize(
    "make",
    [
        *(
            only_train,
            no_train,
            a_fourth,
            a_list_of_another_name,
            twice,
            other_names,
            one_level_down,
            without_classes,
        ),
        two_without_classes,
    ],
)
def test_what_looks_like_a_split_is_never_drawn_anew(make, tmp_path):
    message = make(tmp_path)
    with pytest.raises(DataError, match=message):
        load("folder", "train", tmp_path)


def test_classes_may_have_names_like_splits(tmp_path):
    write_classes(tmp_path, ["train", "ship", "plane", "test tube", "valve"], examples=1)
    found = [load_host("folder", split, tmp_path).index.class_names for split in SPLITS]
    assert sorted(sum(found, ())) == ["plane", "ship", "test tube", "train", "valve"]


def drawing(path, mode="RGBA"):
    """Black lines on nothing, as drawing programs save them."""
    pixels = np.zeros((20, 20, 4), np.uint8)
    pixels[5:15, 5:15, 3] = 255
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).convert(mode).save(path)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize(("colour", "level"), [("white", 255), ("#404040", 64), ("black", 0)])
def test_what_is_transparent_shows_the_background(mode, colour, level, tmp_path):
    drawing(tmp_path / PICTURE, mode)
    image = converted(tmp_path, Reading(size=20, background=colour))
    assert (image[0, 0] == level).all()
    assert (image[10, 10] == 0).all()


def test_a_palette_with_a_transparent_colour(tmp_path):
    image = Image.new("P", (20, 20), 1)
    image.putpalette([0, 0, 0, 200, 10, 10])
    (tmp_path / PICTURE).parent.mkdir(parents=True)
    image.save(tmp_path / PICTURE, transparency=1)
    assert (converted(tmp_path, Reading(size=20)) == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_upright(orientation, tmp_path):
    """The same picture, stored turned and mirrored in each of the eight ways, looks the same."""
    upright = np.zeros((16, 16, 3), np.uint8)
    upright[:8, :4] = 255
    stored = {
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.swapaxes(0, 1),
        6: lambda x: np.rot90(x),
        7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
        8: lambda x: np.rot90(x, -1),
    }[orientation](upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    (tmp_path / PICTURE).parent.mkdir(parents=True)
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / PICTURE, exif=exif)
    np.testing.assert_array_equal(converted(tmp_path, Reading(size=16)), upright)


@pytest.mark.parametrize("size", [(60, 20), (20, 60), (21, 20), (20, 20)])
def test_shapes_are_kept_by_a_crop_and_not_by_a_squeeze(size, tmp_path):
    """A circle in the middle stays one; white at the ends of the long side is cut off."""
    width, height = size
    down, right = np.mgrid[:height, :width]
    inside = (down - (height - 1) / 2) ** 2 + (right - (width - 1) / 2) ** 2 < 8**2
    (tmp_path / PICTURE).parent.mkdir(parents=True)
    Image.fromarray(np.uint8(255 * inside)).save(tmp_path / PICTURE)
    cropped = converted(tmp_path, Reading(size=10))[..., 0] > 127
    assert cropped.any(axis=0).sum() == cropped.any(axis=1).sum() == 8
    squeezed = converted(tmp_path, Reading(size=10, fit="squeeze"))[..., 0] > 127
    square = max(size) < 2 * min(size)
    assert (squeezed.any(axis=0).sum() == squeezed.any(axis=1).sum()) == square


def test_one_channel_where_all_images_have_one(tmp_path):
    for number in range(3):
        write_image(tmp_path / f"class {number}" / "1.png", (9, 9, 9), mode="L")
        write_image(tmp_path / f"class {number}" / "2.png", (9, 9, 9), mode="LA")
    assert load("folder", "train", tmp_path, Reading(size=8)).example_shape == (8, 8, 1)
    write_image(tmp_path / "class 1" / "2.png", (9, 0, 9))
    found = load("folder", "train", tmp_path, Reading(size=8))
    assert found.example_shape == (8, 8, 3)
    assert load("folder", "train", tmp_path, Reading(size=6)).example_shape == (6, 6, 3)


def uneven():
    """Classes of 1, 2, 3 and 9 examples, each example its own number."""
    labels = np.repeat(np.arange(4), [1, 2, 3, 9])
    return Dataset.from_arrays(np.arange(len(labels))[:, None], labels, name="uneven")


def test_small_classes_are_named(caplog):
    Episodes(ways=1, shots=1, queries=3).check(uneven())
    assert "3 of 4 classes have too few examples for shots=1 and queries=3" in caplog.text
    assert "left out: 0 (1), 1 (2), 2 (3)" in caplog.text


@pytest.mark.parametrize("shots", [2, (1, 2)])
def test_uneven_episodes_take_what_there_is(shots, caplog):
    dataset = uneven()
    episodes = Episodes(ways=3, shots=shots, queries=12, uneven=True)
    episodes.check(dataset)
    assert "1 of 4 classes" in caplog.text  # one example cannot be both support and query
    tasks = jax.jit(episodes.sample_batch, static_argnums=2)(dataset, jax.random.key(0), 50)
    class_of = np.repeat(np.arange(4), [1, 2, 3, 9])
    for support, labels, query, query_labels in zip(
        *map(np.asarray, jax.tree.leaves(tasks)), strict=True
    ):
        used, asked = support[labels >= 0, 0], query[query_labels >= 0, 0]
        assert not set(used) & set(asked)
        for label in range(3):
            known, wanted = support[labels == label, 0], query[query_labels == label, 0]
            (number,) = set(class_of[known]) | set(class_of[wanted])
            size = [1, 2, 3, 9][number]
            assert 1 <= len(known) <= min(2, size - 1)
            assert shots != 2 or len(known) == min(2, size - 1)
            assert len(wanted) == size - min(2, size - 1)


def test_prototypes_of_uneven_shots():
    """A class of one shot is not drawn towards its padding: the same logits as by hand."""
    from memmeta import algorithms, models

    network = models.conv4(2, width=2, image_shape=(8, 8, 1), depth=1)
    learner = algorithms.protonet(network)
    theta = learner.init(jax.random.key(0))
    images = jax.random.uniform(jax.random.key(1), (6, 8, 8, 1))
    from memmeta.problem import Task

    padded = Task(
        images[jnp.array([0, 1, 2, 2])],
        jnp.array([0, 0, 1, -1], jnp.int32),
        images[3:],
        jnp.array([0, 1, -1], jnp.int32),
    )
    plain = Task(
        images[:3], jnp.array([0, 0, 1], jnp.int32), images[3:5], jnp.array([0, 1], jnp.int32)
    )
    found = [
        learner.evaluate(theta, jax.tree.map(lambda x: x[None], task)).loss
        for task in (padded, plain)
    ]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)


def test_a_data_set_from_arrays():
    images = np.arange(6 * 4, dtype=np.uint8).reshape(6, 2, 2, 1)
    dataset = Dataset.from_arrays(
        images, ["b", "a", "b", "c", "a", "b"], groups=[1, 0, 1, 0, 0, 1], name="mine", split="test"
    )
    assert dataset.class_names == ("a", "b", "c")
    assert dataset.count.tolist() == [2, 3, 1]
    assert dataset.group_names == ("0", "1")
    assert dataset.group.tolist() == [0, 1, 0]
    np.testing.assert_array_equal(dataset.inputs[1], images[[0, 2, 5]])
    np.testing.assert_array_equal(dataset.inputs[2, 1:], 0)
    Episodes(ways=2, shots=1, queries=1).check(dataset)


@pytest.mark.parametrize(
    ("inputs", "labels", "groups", "message"),
    [
        (np.zeros((0, 2)), [], None, "at least one example"),
        (np.zeros((3, 2)), [1, 2], None, "labels: expected"),
        (np.zeros((3, 2)), [1.5, 2.5, 3.0], None, "labels: expected"),
        (np.zeros((2, 2)), [1, 1], [0, 1], "the class 1 is in two groups"),
        (np.array(["a", "b"]), [0, 1], None, "inputs: expected numbers"),
        (np.zeros((2, 2)), [0, 1], [0], "groups: expected"),
    ],
)
def test_arrays_that_are_no_data_set(inputs, labels, groups, message):
    with pytest.raises(DataError, match=message):
        Dataset.from_arrays(inputs, labels, groups=groups)


def test_npz_files_by_split_and_by_class(tmp_path):
    pixels = np.arange(4 * 9, dtype=np.uint8).reshape(4, 3, 3, 1)
    np.savez(
        tmp_path / "Train.npz", images=pixels, labels=["x", "y", "x", "y"], groups=list("aabb")
    )
    for name in ("cat", "dog"):
        path = tmp_path / "test" / "pets" / f"{name}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, images=pixels)
    with pytest.raises(DataError, match="the class x is in two groups"):
        load("npz", "train", tmp_path)
    np.savez(tmp_path / "Train.npz", images=pixels, labels=["x", "y", "x", "y"])
    assert load("npz", "train", tmp_path).count.tolist() == [2, 2]
    test = load_host("npz", "test", tmp_path).index
    assert test.class_names == ("pets/cat", "pets/dog")
    assert test.group_names == ("pets",)
    with pytest.raises(DataError, match=r"neither validation\.npz nor a folder validation"):
        load("npz", "validation", tmp_path)


def pickled(path):
    np.savez(path, images=np.array([{}], dtype=object), labels=[0])


def without_labels(path):
    np.savez(path, images=np.zeros((2, 3)))


def bomb(path):
    np.savez_compressed(path, images=np.zeros((2, 2**26), np.uint8), labels=[0, 1])


def not_one(path):
    path.write_bytes(b"PK words")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (pickled, "no archive of plain arrays"),
        (without_labels, "has no array 'labels'"),
        (bomb, "allow it by most_unpacked"),
        (not_one, "no archive of plain arrays"),
    ],
)
def test_npz_files_that_cannot_be_used(write, message, tmp_path):
    write(tmp_path / "train.npz")
    with pytest.raises(DataError, match=message):
        load("npz", "train", tmp_path)
