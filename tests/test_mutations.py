"""Files altered at random: each is used or refused by one error, and nothing else is touched."""

import io
import json
import random
import shutil
import tarfile
import zipfile
from collections import Counter

import jax.numpy as jnp
import numpy as np
import pytest
from test_strangers import images, untouched

from memmeta.data import DataError, Reading, load, load_host
from memmeta.runs import Config, RunFolder, UserError, checkpoints, report

pytestmark = pytest.mark.slow

Image = pytest.importorskip("PIL.Image", reason="the extra [images] is not installed")
REFUSED = (UserError, DataError, checkpoints.CheckpointError)
SMALL = Reading(size=8)
WORDS = [
    *(b"0", b"-1", b"1" + b"0" * 400, b"1e999", b"NaN", b"null", b"true", b'""', b"[]", b"{}"),
    *(b"[" * 2000, b"\x00", b"\xff\xfe", b"../../outside", b"/", b"\\udce9", b'"', b"\n", b",,,"),
]


def mutated(rng, content):
    """A content with one to three alterations of random kinds."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(len(data) + 1)
        end = min(place + rng.randint(1, 24), len(data))
        match rng.randrange(6):
            case 0 if place < len(data):
                data[place] ^= 1 << rng.randrange(8)
            case 1:
                del data[place:]
            case 2:
                del data[place:end]
            case 3:
                data[place:end] = rng.choice(WORDS)
            case 4:
                data[place:place] = data[place:end] * rng.randint(1, 4)
            case _:
                data[place:end] = rng.randbytes(end - place)
    return bytes(data)


def complaint(use):
    """What an error of ours said; empty where there was none. Any other error is a failure."""
    try:
        use()
    except REFUSED as error:
        return str(error)
    except OSError as error:
        if error.errno is not None:  # the system's, which nobody has put into words
            raise
        return str(error)
    return ""


def configurations(folder):
    (folder / "config.json").write_text(Config(ways=3, ridge=0.1).to_json())

    def use():
        config = RunFolder(folder).config()
        assert Config.from_json(config.to_json(), "again") == config

    return [folder / "config.json"], use


def log_points(folder):
    line = {"step": 1, "loss": 0.5, "accuracy": 0.25, "masked": 0, "tasks_per_second": 31.5}
    checked = {"validation_accuracy": 0.5, "validation_interval": 0.1}
    rows = [json.dumps(line | {"step": step} | checked) for step in range(1, 6)]
    (folder / "metrics.jsonl").write_text("\n".join(rows) + "\n")

    def use():
        before = RunFolder(folder).metrics()
        RunFolder(folder).keep_metrics_until(4)
        assert RunFolder(folder).metrics() == [found for found in before if found["step"] <= 4]
        for aside in folder.glob("metrics.set-aside-*"):
            aside.unlink()

    return [folder / "metrics.jsonl"], use


def reports(folder):
    final = {"method": "maml", "data": "glyphs", "meta_steps": 4, "ways": 5, "shots": 1}
    final |= {"episodes": 10, "accuracy": {"any styles": {"mean": 0.5, "interval": 0.1}}}
    final |= {"meta_steps_per_second": 3.5, "meta_step_temporary_bytes": 100, "backend": "cpu"}
    (folder / "report.json").write_text(json.dumps(final | {"devices": 1}))
    (folder / "config.json").write_text(Config().to_json())

    def use():
        report.write(report.judge_all([folder], 2), folder / "page.html", 2)

    return [folder / "report.json"], use


def stored_states(folder):
    state = {"weight": jnp.arange(3.0)}
    for step in (1, 2):
        checkpoints.save(folder / "checkpoints", step, state, {"config": Config().plain()})
    files = [path for path in (folder / "checkpoints" / "00000002").rglob("*") if path.is_file()]

    def use():
        for step in checkpoints.whole(folder / "checkpoints"):
            checkpoints.note(folder / "checkpoints", step)
        found = checkpoints.restore(folder / "checkpoints", state)
        np.testing.assert_array_equal(found["weight"], state["weight"])
        checkpoints.set_aside(folder / "checkpoints", 3)

    return [folder / "checkpoints" / "00000002.json", *files], use


def conversions(folder):
    images(folder, classes=3, examples=2)
    load_host("folder", "train", folder, SMALL)
    cache = next((folder / ".memmeta").glob("folder*8*/manifest.json")).parent

    def use():
        found = load_host("folder", "train", folder, SMALL)
        assert found.rows.shape[1:] == (8, 8, 3)
        assert len(found.index.class_names) == 1

    return [cache / "manifest.json", cache / "train.npy"], use


def archives(folder):
    """None holds the published classes: where that is what is said, all was unpacked."""
    files = [folder / kind / f"mini_imagenet.{kind}" for kind in ("zip", "tar", "tar.gz")]
    for path in files:
        path.parent.mkdir()
    with zipfile.ZipFile(files[0], "w", zipfile.ZIP_DEFLATED) as file:
        for name in ("a/1.png", "a/2.png", "b/3.png"):
            file.writestr(name, name * 20)
    for path, kind in zip(files[1:], ("w", "w:gz"), strict=True):
        with tarfile.open(path, kind) as file:
            for member in ("a/1.png", "b/2.png"):
                info = tarfile.TarInfo(member)
                info.size = 5
                file.addfile(info, io.BytesIO(b"words"))

    def use():
        problem = None
        for path in files:
            try:
                load("mini_imagenet", "train", path.parent)
            except DataError as error:
                if "published split" not in str(error):
                    problem = error
            assert {found.name for found in path.parent.iterdir()} <= {path.name, "mini_imagenet"}
            shutil.rmtree(path.parent / "mini_imagenet", ignore_errors=True)
        if problem is not None:
            raise problem

    return files, use


def pictures(folder):
    noise = np.random.default_rng(0).integers(0, 256, (12, 9, 4), np.uint8)
    picture = Image.fromarray(noise)
    for split in ("train", "val", "test"):
        (folder / split / split).mkdir(parents=True)
    for suffix in ("png", "webp", "tif"):
        picture.save(folder / "train" / "train" / f"with alpha.{suffix}")
    for suffix, split in (("jpg", "val"), ("bmp", "val"), ("gif", "test"), ("ppm", "test")):
        picture.convert("RGB").save(folder / split / split / f"plain.{suffix}")
    picture.convert("RGB").save(folder / "train" / "train" / "plain.png")
    files = sorted(path for path in folder.rglob("*.*") if path.is_file())
    return files, lambda: converted(folder, (4, 8, 8, 3))


def converted(folder, shape):
    """Use a folder of images that nobody has converted yet."""
    shutil.rmtree(folder / ".memmeta", ignore_errors=True)
    assert load_host("folder", "train", folder, SMALL).rows.shape == shape


def lists(folder):
    images(folder / "images", classes=3, examples=1)
    for number, split in enumerate(("train", "val", "test")):
        row = f"class {number}/0.png,label {number}"
        (folder / f"{split}.csv").write_text(f"filename,label\n{row}\n")
    (folder / "categories.csv").write_text(
        "label,category\n" + "".join(f"label {n},kind\n" for n in range(3))
    )
    files = [folder / "train.csv", folder / "categories.csv"]
    return files, lambda: converted(folder, (1, 8, 8, 3))


def arrays(folder):
    labels = np.array([0, 0, 1, 1])
    for split in ("train", "test"):
        pixels = np.zeros((4, 3, 3, 1), np.uint8)
        np.savez_compressed(folder / f"{split}.npz", images=pixels, labels=labels)
    return [folder / "train.npz"], lambda: load("npz", "train", folder)


KINDS = {
    configurations: 300,
    log_points: 250,
    reports: 250,
    stored_states: 150,
    conversions: 200,
    archives: 200,
    pictures: 300,
    lists: 150,
    arrays: 150,
}
TIMES = [1, pytest.param(4, marks=pytest.mark.slow)]


@pytest.mark.parametrize("times", TIMES, ids=["once", "many times"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_altered_files_are_used_or_refused(kind, times, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "mine").write_text("mine")
    folder = tmp_path / "theirs"
    folder.mkdir()
    files, use = kind(folder)
    (folder / "notes of mine.txt").write_text("mine")
    rng, found = random.Random(len(files)), Counter()
    whole = {path: path.read_bytes() for path in files}
    for _ in range(KINDS[kind] * times):
        victim = rng.choice(files)
        victim.write_bytes(mutated(rng, whole[victim]))
        with untouched(outside):
            said = complaint(use)
        assert "\n" not in said
        found["refused" if said else "used"] += 1
        victim.parent.mkdir(parents=True, exist_ok=True)
        for path, content in whole.items():
            path.write_bytes(content)
    print(kind.__name__, dict(found))
    assert (folder / "notes of mine.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["outside", "theirs"]
