"""Data sets from folders of images: what is converted, what is refused, and what a cache holds."""

import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import unicodedata
import zipfile
from itertools import chain
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import memmeta.data
from memmeta.__main__ import main
from memmeta.data import DataError, Episodes, HostDataset, Reading, load, load_host

Image = pytest.importorskip("PIL.Image", reason="the extra [images] is not installed")
ImageOps = pytest.importorskip("PIL.ImageOps")
SPLITS = ("train", "validation", "test")
PICTURE = Path("train", "picture", "1.png")


def published(name):
    """A published split as it is shipped."""
    (path,) = Path(memmeta.data.__file__).parent.rglob(f"{name}.json")
    return json.loads(path.read_text(encoding="utf-8"))


def converted(root, reading):
    """The image `root / PICTURE` as `load` gives it; the other splits have images in colour."""
    for split in ("val", "test"):
        write_image(root / split / split / "1.png", (1, 2, 3))
    (image,) = np.asarray(load("folder", "train", root, reading).inputs[0])
    return image


def write_image(path: Path, colour, size=(9, 7), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(path)


def write_classes(folder: Path, names, examples=3, start=0):
    for number, name in enumerate(names, start):
        for example in range(examples):
            write_image(folder / name / f"{example}.png", (number, example, 200))


def make_tree(root: Path, names=("train", "val", "test")):
    """Two classes a split; every image of one colour: (class, example, 200)."""
    for index, split in enumerate(names):
        write_classes(root / split, [f"{split}-a", f"{split}-b"], start=2 * index)
    return root


def test_split_folders_become_a_data_set(tmp_path):
    make_tree(tmp_path)
    write_image(tmp_path / "train" / "train-b" / "3.jpg", (1, 3, 200))
    (tmp_path / "train" / "train-b" / ".DS_Store").write_text("hidden files are left alone")
    (tmp_path / "train" / "train-b" / "notes.txt").write_text("and so are other files")
    dataset = load("folder", "train", tmp_path)
    assert dataset.inputs.shape == (2, 4, 84, 84, 3)
    assert dataset.inputs.dtype == jnp.uint8
    assert dataset.class_names == ("train-a", "train-b")
    assert dataset.count.tolist() == [3, 4]
    found = np.asarray(dataset.inputs)[:, :, 40, 40]
    np.testing.assert_array_equal(found[0, :3], [[0, e, 200] for e in range(3)])
    np.testing.assert_array_equal(found[0, 3], 0)  # padding
    np.testing.assert_allclose(found[1, 3], [1, 3, 200], atol=3)  # JPEG
    assert load("folder", "validation", tmp_path).class_names == ("val-a", "val-b")
    host = load_host("folder", "test", tmp_path)
    assert isinstance(host, HostDataset)
    assert isinstance(host.rows, np.memmap)
    Episodes(ways=2, queries=2).check(host.to_device())


def test_images_that_changed_are_converted_again(tmp_path, caplog):
    make_tree(tmp_path)
    before = load_host("folder", "test", tmp_path)
    (tmp_path / "test" / "test-a" / "0.png").unlink()
    write_image(tmp_path / "test" / "test-b" / "1.png", (77, 77, 77))
    after = load("folder", "test", tmp_path)
    assert after.count.tolist() == [2, 3]
    np.testing.assert_array_equal(after.inputs[1, 1, 0, 0], 77)
    assert "have changed since they were converted" in caplog.text
    assert before.rows[0, 0, 0, 2] == 200  # who had the old ones open keeps them


def test_converted_data_need_the_images_no_more(tmp_path, caplog):
    make_tree(tmp_path)
    load("folder", "train", tmp_path)
    for split in ("train", "val", "test"):
        shutil.rmtree(tmp_path / split)
    assert load("folder", "test", tmp_path).count.tolist() == [3, 3]
    assert "is used, though its images cannot be found" in caplog.text


def test_class_folders_alone_are_split_by_seed(tmp_path):
    names = [f"группа/类 {i}" for i in range(10)]  # nested, and not ASCII
    write_classes(tmp_path, names, examples=2)
    found = {split: load("folder", split, tmp_path) for split in SPLITS}
    assert [len(dataset.class_names) for dataset in found.values()] == [6, 2, 2]
    assert sorted(n for d in found.values() for n in d.class_names) == sorted(names)
    assert found["train"].group_names == ("группа",)
    other = load("folder:1", "train", tmp_path).class_names
    assert other != found["train"].class_names
    assert other == load("folder:1", "train", tmp_path).class_names
    with pytest.raises(DataError, match="folder:x: expected folder:SEED"):
        load("folder:x", "train", tmp_path)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "LA", "CMYK"])
def test_other_modes_become_rgb(tmp_path, mode):
    path = tmp_path / PICTURE.with_suffix(".tif" if mode == "CMYK" else ".png")
    write_image(path, (255, 255, 255), mode=mode)
    found = converted(tmp_path, Reading())
    assert found.shape == (84, 84, 3)
    assert found.dtype == np.uint8
    assert (found == 255).all()


def damage(path: Path, how: str):
    match how:
        case "truncated":
            noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), np.uint8)
            Image.fromarray(noise).save(path)
            path.write_bytes(path.read_bytes()[:-4000])
        case "empty file":
            path.write_bytes(b"")
        case "no image":
            path.write_text("words")
        case "16 bits":
            Image.fromarray(np.full((5, 5), 40_000, np.uint16)).save(path)


@pytest.mark.parametrize("how", ["truncated", "empty file", "no image", "16 bits"])
def test_damaged_image_is_named_and_mending_it_resumes(tmp_path, monkeypatch, how):
    make_tree(tmp_path)
    victim = tmp_path / "val" / "val-b" / "1.png"
    damage(victim, how)
    with pytest.raises(DataError, match=r"val-b/1\.png: not a whole image .* replace") as error:
        load("folder", "train", tmp_path)
    assert "\n" not in str(error.value)
    write_image(victim, (3, 1, 200))
    read, turn_upright = [], ImageOps.exif_transpose
    monkeypatch.setattr(ImageOps, "exif_transpose", lambda x: read.append(x) or turn_upright(x))
    dataset = load("folder", "validation", tmp_path)
    assert len(read) == 9  # val-b and the two test classes; the three before it were kept
    np.testing.assert_array_equal(dataset.inputs[1, 1, 0, 0], [3, 1, 200])


def test_rows_lost_in_an_interruption_are_read_again(tmp_path):
    whole = load("folder", "train", make_tree(tmp_path / "whole"))
    root = make_tree(tmp_path / "images")
    victim = root / "test" / "test-b" / "1.png"
    damage(victim, "truncated")
    with pytest.raises(DataError, match=r"test-b/1\.png: not a whole image"):
        load("folder", "train", root)
    # as after a crash: a line cut off, and rows that never reached the disk
    folder = root / ".memmeta" / "folder"
    with (folder / "finished.jsonl").open("a") as journal:
        journal.write('{"class": "tr')
    rows = np.lib.format.open_memmap(folder / "train.npy", mode="r+")
    assert rows[4].any()
    rows[4] = 0
    rows.flush()
    write_image(victim, (5, 1, 200))
    np.testing.assert_array_equal(load("folder", "train", root).inputs, whole.inputs)


@pytest.mark.parametrize("how", ["bit", "truncated", "missing", "pickle", "manifest"])
def test_altered_cache_is_refused(tmp_path, how):
    make_tree(tmp_path)
    load("folder", "train", tmp_path)
    folder = tmp_path / ".memmeta" / "folder"
    path = folder / "train.npy"
    match how:
        case "bit":
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
            path.write_bytes(content)
        case "truncated":
            path.write_bytes(path.read_bytes()[:-1])
        case "missing":
            path.unlink()
        case "pickle":
            np.save(path, np.array([{}], dtype=object), allow_pickle=True)
        case "manifest":
            (folder / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match=r"remove .*\.memmeta/folder to have it made again"):
        load("folder", "train", tmp_path)


def empty_class(root):
    (root / "train" / "train-c").mkdir()
    return r"class train-c of train is empty"


def class_in_two_splits(root):
    write_classes(root / "test", ["train-a"])
    return r"class train-a is there 2 times \(in train, test\)"


def same_name_composed_and_decomposed(root):
    write_classes(root / "train", [unicodedata.normalize(form, "é") for form in ("NFC", "NFD")])
    return r"class é is there 2 times"


def image_outside_a_class(root):
    write_image(root / "train" / "stray.png", (0, 0, 0))
    return r"train/stray\.png .* is in no class folder"


def link_to_a_file_outside(root):
    write_image(root.parent / "outside.png", (0, 0, 0))
    (root / "train" / "train-a" / "link.png").symlink_to(root.parent / "outside.png")
    return r"link\.png leads out of"


def link_to_a_folder(root):
    (root / "train" / "loop").symlink_to(root / "train")
    return r"loop is a link to a folder"


def nothing_in_a_split(root):
    (root / "train").rename(root.parent / "elsewhere")
    (root / "train").mkdir()
    return r"split train has no classes"


@pytest.mark.parametrize(
    "spoil",
    [
        empty_class,
        class_in_two_splits,
        same_name_composed_and_decomposed,
        image_outside_a_class,
        link_to_a_file_outside,
        link_to_a_folder,
        nothing_in_a_split,
    ],
)
def test_trees_that_cannot_be_used(tmp_path, spoil):
    root = make_tree(tmp_path / "images")
    message = spoil(root)
    with pytest.raises(DataError, match=message):
        load("folder", "train", root)


def test_links_within_the_tree_are_read(tmp_path):
    make_tree(tmp_path)
    link = tmp_path / "train" / "train-a" / "link.png"
    link.symlink_to(tmp_path / "train" / "train-a" / "0.png")
    assert load("folder", "train", tmp_path).count.tolist() == [4, 3]


def make_mini(root: Path, counts=(64, 16, 20)):
    """The layout of the published lists: all images in one folder, and a CSV file a split."""
    label = 0
    for split, count in zip(("train", "val", "test"), counts, strict=True):
        lines = ["filename,label"]
        for _ in range(count):
            name = f"n{label:08}"
            write_image(root / "images" / f"{name}00.jpg", (label, 0, 0))
            lines.append(f"{name}00.jpg,{name}")
            label += 1
        (root / f"{split}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


def test_mini_imagenet_from_lists(tmp_path):
    root = make_mini(tmp_path / "mini_imagenet")
    lines = [f"n{i:08},{'animal' if i % 2 else 'thing'}" for i in range(100)]
    (root / "categories.csv").write_text("\n".join(["label,category", *lines]))
    sizes = [len(load("mini_imagenet", split, tmp_path).class_names) for split in SPLITS]
    assert sizes == [64, 16, 20]
    dataset = load_host("mini_imagenet", "test", tmp_path).index
    assert dataset.class_names[0] == "n00000080"
    assert dataset.group_names == ("animal", "thing")
    assert dataset.group[:3].tolist() == [1, 0, 1]


def sizes(name, data_dir):
    """The numbers of classes and of groups of each split."""
    found = [load_host(name, split, data_dir, Reading(size=1)).index for split in SPLITS]
    return [len(d.class_names) for d in found], [len(d.group_names) for d in found]


def test_tiered_imagenet_has_its_published_split_and_categories(tmp_path):
    root, label, lines = tmp_path / "tiered_imagenet", 0, ["label,category"]
    for split, count in (("train", 351), ("val", 97), ("test", 160)):
        for number in range(count):
            name = f"n{label:08}"
            write_image(root / split / name / "0.png", (0, 0, 0), size=(1, 1))
            lines.append(f"{name},{split} category {number // 20}")
            label += 1
    (root / "categories.csv").write_text("\n".join(lines), encoding="utf-8")
    (root / "test" / "n00000607").rename(tmp_path / "aside")
    with pytest.raises(DataError, match=r"have \[351, 97, 159\] classes, .* has \[351, 97, 160\]"):
        load("tiered_imagenet", "train", tmp_path)
    (tmp_path / "aside").rename(root / "test" / "n00000607")
    assert sizes("tiered_imagenet", tmp_path) == ([351, 97, 160], [18, 5, 8])


def test_mini_imagenet_from_class_folders_alone(tmp_path):
    """Named by their WordNet ids, they need no lists; further classes of ImageNet are left out."""
    root = tmp_path / "mini_imagenet"
    listed = published("mini_imagenet")["splits"]
    write_classes(root, [*chain(*listed.values()), "n01440764"], examples=1)
    found = {split: load_host("mini_imagenet", split, tmp_path).index for split in SPLITS}
    assert [len(dataset.class_names) for dataset in found.values()] == [64, 16, 20]
    assert "n03544143" in found["test"].class_names  # hourglass
    assert "n09256479" in found["validation"].class_names  # coral reef


def test_tiered_imagenet_from_folders_of_categories(tmp_path):
    """The published list gives the categories, and so do folders of them; no class is elsewhere."""
    root = tmp_path / "tiered_imagenet"
    for category, labels in published("tiered_imagenet")["groups"].items():
        for number, label in enumerate(labels):
            folder = root / label if number % 2 else root / category / label
            write_image(folder / "0.png", (0, 0, 0), size=(1, 1))
    assert sizes("tiered_imagenet", tmp_path) == ([351, 97, 160], [20, 6, 8])
    groups = load_host("tiered_imagenet", "test", tmp_path, Reading(size=1)).index.group_names
    assert set(groups) >= {"n02159955", "n09287968"}  # insects, shores


def write_mini(data_dir, splits):
    """A folder of splits whose classes have one small image each."""
    for split, names in splits.items():
        for name in names:
            folder = data_dir / "mini_imagenet" / split / name
            write_image(folder / "0.png", (0, 0, 0), size=(1, 1))
    return data_dir


@pytest.mark.parametrize("names", ["published", "of one's own"])
def test_splits_that_are_the_published_one(names, tmp_path):
    splits = published("mini_imagenet")["splits"]
    if names != "published":  # these are only counted
        splits = {s: [f"{s} {n}" for n in range(len(found))] for s, found in splits.items()}
    write_mini(tmp_path, splits)
    for split in SPLITS:
        found = load_host("mini_imagenet", split, tmp_path, Reading(size=1)).index.class_names
        assert sorted(found) == sorted(splits[split])


def exchanged(data_dir, splits):
    splits["train"][0], splits["test"][0] = splits["test"][0], splits["train"][0]
    write_mini(data_dir, splits)
    return r"n01532829 is in test, .* it is in train: move it"


def too_many_examples(data_dir, splits):
    write_mini(data_dir, splits)
    for number in range(1, 601):
        (data_dir / "mini_imagenet" / "train" / "n01532829" / f"{number}.png").touch()
    return r"n01532829 has 601 examples, .* at most 600"


def one_published_name(data_dir, splits):
    own = {split: [f"{split} {n}" for n in range(len(found))] for split, found in splits.items()}
    own["test"][0] = "n01930112"
    write_mini(data_dir, own)
    return r"99 of the 100 classes"


@pytest.mark.parametrize("spoil", [exchanged, too_many_examples, one_published_name])
def test_splits_that_are_not_the_published_one(spoil, tmp_path):
    message = spoil(tmp_path, published("mini_imagenet")["splits"])
    with pytest.raises(DataError, match=message):
        load("mini_imagenet", "train", tmp_path)


def test_a_conversion_shows_how_far_it_is(tmp_path, monkeypatch, capsys):
    """On a terminal. The last of four images is damaged, so that the bar ends at three."""
    write_classes(tmp_path / "train", ["a", "b"], examples=1)
    write_classes(tmp_path / "val", ["c"], examples=1)
    (tmp_path / "test" / "d").mkdir(parents=True)
    damage(tmp_path / "test" / "d" / "0.png", "truncated")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    run = ["--run", str(tmp_path / "run"), "--data=folder", f"--data-dir={tmp_path}"]
    assert main(["train", *run]) == 1
    said = capsys.readouterr().err
    assert "converting folder" in said
    assert "75%" in said


@pytest.mark.parametrize("suffix", ["zip", "tar.gz"])
def test_archives_are_unpacked(tmp_path, suffix):
    root = make_mini(tmp_path / "source" / "mini_imagenet")
    archive = tmp_path / f"mini_imagenet.{suffix}"
    if suffix == "zip":
        with zipfile.ZipFile(archive, "w") as file:
            for path in root.rglob("*.*"):
                file.write(path, path.relative_to(root))
    else:
        with tarfile.open(archive, "w:gz") as file:
            file.add(root, "mini_imagenet")
    assert len(load("mini_imagenet", "train", tmp_path).class_names) == 64


def evil_zip(path, name):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(name, "words")


def evil_tar(path, name):
    with tarfile.open(path, "w") as file:
        member = tarfile.TarInfo(name)
        member.size = 5
        file.addfile(member, io.BytesIO(b"words"))


def link_tar(path, target):
    with tarfile.open(path, "w") as file:
        member = tarfile.TarInfo("link")
        member.type, member.linkname = tarfile.SYMTYPE, target
        file.addfile(member)


@pytest.mark.parametrize(
    ("suffix", "write"), [("zip", evil_zip), ("tar", evil_tar), ("tar", link_tar)]
)
@pytest.mark.parametrize("name", ["../outside", "a/../../outside", "{folder}/outside"])
def test_members_outside_the_folder_are_refused(tmp_path, suffix, write, name):
    data, name = tmp_path / "data", name.format(folder=tmp_path)
    data.mkdir()
    write(data / f"mini_imagenet.{suffix}", name)
    if write is evil_tar and name.startswith("/"):  # tar names are taken relative to the folder
        with pytest.raises(
            DataError, match=r"100 of the 100 classes .* not there, such as n01532829"
        ):
            load("mini_imagenet", "train", data)
    else:
        with pytest.raises(DataError, match=r"mini_imagenet\.(zip|tar)"):
            load("mini_imagenet", "train", data)
        assert not (data / "mini_imagenet").exists()
    assert not (tmp_path / "outside").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and no more", b"words"])
def test_damaged_archive_is_refused(tmp_path, content):
    (tmp_path / "mini_imagenet.zip").write_bytes(content)
    with pytest.raises(DataError, match=r"cannot be unpacked"):
        load("mini_imagenet", "train", tmp_path)


def test_archive_must_agree_with_its_checksum(tmp_path):
    evil_zip(tmp_path / "mini_imagenet.zip", "a")
    (tmp_path / "mini_imagenet.zip.sha256").write_text("0" * 64 + "  mini_imagenet.zip\n")
    with pytest.raises(DataError, match="truncated or altered"):
        load("mini_imagenet", "train", tmp_path)


def wrong_number(root):
    make_mini(root, (63, 16, 20))
    return r"have \[63, 16, 20\] classes, .* has \[64, 16, 20\]"


def listed_twice(root):
    make_mini(root)
    lines = (root / "train.csv").read_text().splitlines()
    (root / "train.csv").write_text("\n".join([*lines, lines[1]]))
    return r"train\.csv: n0000000000\.jpg is listed twice"


def not_there(root):
    make_mini(root)
    (root / "images" / "n0000000000.jpg").unlink()
    return r"train\.csv: n0000000000\.jpg is not in"


def other_columns(root):
    make_mini(root)
    (root / "val.csv").write_text("file;class\n")
    with (root / "val.csv").open("a") as file:
        file.write("a;b\n")
    return r"val\.csv: no CSV file with columns filename and label"


def leads_outside(root):
    make_mini(root)
    write_image(root.parent / "outside.jpg", (0, 0, 0))
    with (root / "test.csv").open("a") as file:
        file.write("../outside.jpg,n00000099\n")
    return r"outside\.jpg leads out of"


def no_category(root):
    make_mini(root)
    (root / "categories.csv").write_text("label,category\nn00000000,animal\n")
    return r"class n00000001 has no category"


@pytest.mark.parametrize(
    "spoil",
    [wrong_number, listed_twice, not_there, other_columns, leads_outside, no_category],
)
def test_lists_that_cannot_be_used(tmp_path, spoil):
    message = spoil(tmp_path / "mini_imagenet")
    with pytest.raises(DataError, match=message):
        load("mini_imagenet", "train", tmp_path)


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(DataError, match=r"mini_imagenet: data_dir is not given"):
        load("mini_imagenet", "train")
    with pytest.raises(DataError, match=r"neither .*tiered_imagenet nor an archive"):
        load("tiered_imagenet", "train", tmp_path)
    with pytest.raises(DataError, match=r"is no folder"):
        load("folder", "train", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"found 0 classes, expected at least 3"):
        load("folder", "train", tmp_path / "empty")


def test_two_processes_at_once(tmp_path):
    make_tree(tmp_path)
    code = (
        "import sys; from memmeta.data import load_host;"
        "print(load_host('folder', 'train', sys.argv[1]).rows.sum())"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    sums = {process.communicate()[0] for process in running}
    assert [process.returncode for process in running] == [0, 0]
    assert sums == {f"{load_host('folder', 'train', tmp_path).rows.sum()}\n"}


@given(
    names=st.lists(st.text("abcxyzäß中 1.", min_size=1, max_size=4), min_size=3, max_size=12),
    seed=st.integers(0, 10**9 - 1),
)
@settings(max_examples=15, deadline=None)
def test_a_drawn_split_is_by_seed_and_names_alone(names, seed):
    """Every class once, no split empty, and in the order of the SHA-256 of "seed/name"."""
    names = sorted({f"{number}{name}" for number, name in enumerate(names)})
    order = sorted(names, key=lambda x: hashlib.sha256(f"{seed}/{x}".encode()).digest())
    first = min(max(round(0.64 * len(names)), 1), len(names) - 2)
    second = min(first + max(round(0.16 * len(names)), 1), len(names) - 1)
    expected = order[:first], order[first:second], order[second:]
    assert all(expected)
    with tempfile.TemporaryDirectory() as folder:
        write_classes(Path(folder), names, examples=1)
        for split, part in zip(SPLITS, expected, strict=True):
            found = load_host(f"folder:{seed}", split, folder, Reading(size=1)).index
            assert list(found.class_names) == sorted(part)
