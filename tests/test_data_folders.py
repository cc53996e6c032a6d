"""Data sets from folders of images: what is converted, what is refused, and what a cache holds."""

import io
import json
import shutil
import subprocess
import sys
import tarfile
import unicodedata
import zipfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from memmeta.data import DataError, Episodes, HostDataset, Reading, load, load_host
from memmeta.data import _cache as cache
from memmeta.data import _folders as folders
from memmeta.data._class_splits import drawn_split, published_split
from memmeta.data._plan import ClassItems, Plan
from memmeta.runs import _progress as progress

Image = pytest.importorskip("PIL.Image", reason="the extra [images] is not installed")
SPLITS = ("train", "validation", "test")


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
    suffix = "tif" if mode == "CMYK" else "png"
    write_image(tmp_path / f"image.{suffix}", (255, 255, 255), mode=mode)
    found = folders.read_image(tmp_path / f"image.{suffix}", Reading())
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
    read, real = [], folders.read_image
    monkeypatch.setattr(folders, "read_image", lambda p, *how: read.append(p.name) or real(p, *how))
    dataset = load("folder", "validation", tmp_path)
    assert len(read) == 9  # val-b and the two test classes; the three before it were kept
    np.testing.assert_array_equal(dataset.inputs[1, 1, 0, 0], [3, 1, 200])


def test_rows_lost_in_an_interruption_are_read_again(tmp_path):
    root = make_tree(tmp_path / "images")
    whole = load("folder", "train", root)
    folder = root / ".memmeta" / "folder"
    manifest = json.loads((folder / cache.MANIFEST).read_text())
    found = folders.find_classes("folder", 0, root)
    plan = folders.make_plan("folder", root, found, Reading())
    stamps = {item.name: item.stamp for item in found["train"]}
    entries = [{"fingerprint": plan.fingerprint()}]
    entries += [
        {
            "key": f"train/{found['name']}",
            "stamp": stamps[found["name"]],
            "sha256": found["sha256"],
        }
        for found in manifest["splits"]["train"]
    ]
    lines = [json.dumps(entry) for entry in entries]
    # as after a crash: no manifest, a line cut off, and rows that never reached the disk
    (folder / cache.JOURNAL).write_text("\n".join(lines) + '\n{"class": "tr')
    (folder / cache.MANIFEST).unlink()
    rows = np.lib.format.open_memmap(folder / "train.npy", mode="r+")
    rows[4] = 0
    rows.flush()
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
            (folder / cache.MANIFEST).write_text("{}")
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


def test_tiered_imagenet_has_its_published_split_and_categories(tmp_path):
    root, label, lines = tmp_path / "tiered_imagenet", 0, ["label,category"]
    for split, count in (("train", 351), ("val", 97), ("test", 160)):
        for number in range(count):
            name = f"n{label:08}"
            (root / split / name).mkdir(parents=True)
            (root / split / name / "0.jpg").touch()
            lines.append(f"{name},{split} category {number // 20}")
            label += 1
    (root / "categories.csv").write_text("\n".join(lines), encoding="utf-8")
    splits = folders.find_classes("tiered_imagenet", 0, tmp_path / "tiered_imagenet")
    assert [len(splits[split]) for split in SPLITS] == [351, 97, 160]
    assert [len({item.group for item in splits[split]}) for split in SPLITS] == [18, 5, 8]
    (root / "test" / "n00000607" / "0.jpg").unlink()
    (root / "test" / "n00000607").rmdir()
    with pytest.raises(DataError, match=r"have \[351, 97, 159\] classes, .* has \[351, 97, 160\]"):
        load("tiered_imagenet", "train", tmp_path)


def test_mini_imagenet_from_class_folders_alone(tmp_path):
    """Named by their WordNet ids, they need no lists; further classes of ImageNet are left out."""
    root = tmp_path / "mini_imagenet"
    listed = published_split("mini_imagenet").split_of
    write_classes(root, [*listed, "n01440764"], examples=1)
    found = {split: load_host("mini_imagenet", split, tmp_path).index for split in SPLITS}
    assert [len(dataset.class_names) for dataset in found.values()] == [64, 16, 20]
    assert "n03544143" in found["test"].class_names  # hourglass
    assert "n09256479" in found["validation"].class_names  # coral reef


def test_tiered_imagenet_from_folders_of_categories(tmp_path):
    """The published list gives the categories, and so do folders of them; no class is elsewhere."""
    published = published_split("tiered_imagenet")
    for number, (label, category) in enumerate(published.group_of.items()):
        path = tmp_path / "tiered_imagenet" / (label if number % 2 else f"{category}/{label}")
        path.mkdir(parents=True)
        (path / "0.jpg").touch()
    splits = folders.find_classes("tiered_imagenet", 0, tmp_path / "tiered_imagenet")
    assert [len(splits[split]) for split in SPLITS] == [351, 97, 160]
    assert [len({item.group for item in splits[split]}) for split in SPLITS] == [20, 6, 8]
    assert {item.group for item in splits["test"]} >= {"n02159955", "n09287968"}  # insects, shores


def items(names, examples=1):
    return [ClassItems(name, "", range(examples)) for name in names]


def test_splits_that_are_not_the_published_one():
    published = published_split("mini_imagenet")
    of = {
        split: [name for name in published.split_of if published.split_of[name] == split]
        for split in SPLITS
    }
    right = {split: items(names) for split, names in of.items()}
    assert published.check(right) == right
    of["train"][0], of["test"][0] = of["test"][0], of["train"][0]
    wrong = {split: items(names) for split, names in of.items()}
    with pytest.raises(DataError, match=r"n01532829 is in test, .* it is in train: move it"):
        published.check(wrong)
    with pytest.raises(DataError, match=r"has 601 examples, .* at most 600"):
        published.divide(items(published.split_of, 601))
    with pytest.raises(DataError, match=r"the published split does not name 'dog'"):
        published.divide(items([*published.split_of, "dog"]))
    own = {split: items(f"{split} {n}" for n in range(len(of[split]))) for split in SPLITS}
    assert published.check(own) == own  # names of one's own are counted
    own["test"][0] = items(["n01930112"])[0]
    with pytest.raises(DataError, match=r"99 of the 100 classes"):
        published.check(own)


def test_a_conversion_shows_how_far_it_is(monkeypatch):
    written = io.StringIO()
    terminal = Console(file=written, force_terminal=True)
    monkeypatch.setattr(progress, "Console", lambda **_: terminal)
    with progress.data_bar("converting leaves", 4) as advance:
        advance(3)
    assert "converting leaves" in written.getvalue()
    assert "75%" in written.getvalue()


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
@pytest.mark.parametrize("name", ["../outside", "a/../../outside", "/tmp/memmeta-outside"])
def test_members_outside_the_folder_are_refused(tmp_path, suffix, write, name):
    data = tmp_path / "data"
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
    assert not Path("/tmp/memmeta-outside").exists()


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


def test_examples_of_the_wrong_shape_are_refused(tmp_path):
    splits = {split: [ClassItems(split, "", (0,))] for split in SPLITS}
    plan = Plan("made", (2, 2), splits, lambda item: np.zeros((2, 3), np.uint8))
    with pytest.raises(DataError, match=r"uint8 \(2, 3\), expected uint8 \(2, 2\)"):
        cache.ensure_cache(tmp_path / "made", lambda: plan)


@given(
    names=st.lists(st.text(min_size=1, max_size=4), min_size=3, max_size=40, unique=True),
    seed=st.integers(0, 2**31),
    shares=st.tuples(st.integers(0, 50), st.integers(0, 50)),
)
@settings(max_examples=20, deadline=None)
def test_a_drawn_split_has_every_class_once_and_no_split_empty(names, seed, shares):
    classes = [ClassItems(name, "", ()) for name in names]
    found = drawn_split(classes, seed, *shares)
    assert all(found.values())
    assert sorted(c.name for part in found.values() for c in part) == sorted(names)
    assert found == drawn_split(classes, seed, *shares)
    # whether a class is drawn before another does not depend on the order they are listed in
    again = drawn_split(classes[::-1], seed, *shares)
    assert {s: set(part) for s, part in again.items()} == {s: set(p) for s, p in found.items()}
