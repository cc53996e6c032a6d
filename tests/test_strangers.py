"""Folders and files of strangers: nothing outside is touched, nothing is lost, one line is said."""

import contextlib
import io
import json
import os
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from test_faults import QUICK, TINY

from memmeta.__main__ import main
from memmeta.data import DataError, Limits, Reading, load, load_host
from memmeta.runs import RunFolder, checkpoints

pytestmark = pytest.mark.slow

Image = pytest.importorskip("PIL.Image", reason="the extra [images] is not installed")
SECRET = "mine, and not to be touched"
RESUME, EVALUATE, REPORT = ["train", "--resume", "--run"], ["evaluate"], ["report"]
OPENED: list[str] | None = None


def _note(event, arguments):
    if OPENED is not None and event == "open":
        OPENED.append(str(arguments[0]))


sys.addaudithook(_note)


@contextlib.contextmanager
def untouched(folder):
    """Nothing in a folder is opened, made, altered or removed."""
    global OPENED
    before = snapshot(folder)
    OPENED = []
    try:
        yield
    finally:
        opened, OPENED = OPENED, None
    assert snapshot(folder) == before
    assert not [path for path in opened if path.startswith(str(folder))]


def snapshot(folder):
    """Every path of a folder with its content; links are not followed."""
    found = {}
    for path in sorted(folder.rglob("*")):
        plain = path.is_file() and not path.is_symlink()
        found[str(path)] = path.read_bytes() if plain else path.lstat().st_mode
    return found


def one_line(capsys):
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err + captured.out
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("memmeta: ")
    return lines[0]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of one small finished run."""
    path = tmp_path_factory.mktemp("strangers") / "run"
    options = [*TINY, *QUICK, "--meta-steps=6", "--devices=1"]
    assert main(["train", "--run", str(path), *options]) == 0
    return path


@pytest.fixture
def theirs(finished, tmp_path):
    """A copy of it, as somebody sent it."""
    return Path(shutil.copytree(finished, tmp_path / "theirs"))


@pytest.fixture
def mine(tmp_path):
    """A folder of the person's own, with things that look like the program's."""
    folder = tmp_path / "mine"
    (folder / "00000002").mkdir(parents=True)
    for name in ("file", "00000002/array", "00000002.json", "metrics.jsonl", "train.npy"):
        (folder / name).write_text(SECRET)
    return folder


FILES = [
    *("config.json", "metrics.jsonl", "metrics.jsonl.new", "report.json", "report.json.new"),
    *(
        "learning_curve.png",
        "offending_batch.npz",
        "lock",
        "metrics.set-aside-1",
        "config.json.new",
    ),
    *("checkpoints/00000006.json", "checkpoints/00000008.json", "checkpoints/00000006.json.new"),
    *("checkpoints/00000006/_METADATA", "events.out.tfevents.1", "notes.txt"),
]


@pytest.mark.parametrize(
    "command", [RESUME, EVALUATE, REPORT], ids=["resume", "evaluate", "report"]
)
@pytest.mark.parametrize("name", FILES)
def test_a_file_of_a_run_that_is_a_link(name, command, theirs, mine, capsys):
    (theirs / name).unlink(missing_ok=True)
    (theirs / name).symlink_to(mine / "file")
    with untouched(mine):
        assert main([*command, str(theirs)]) == 1
    assert "link" in one_line(capsys)


@pytest.mark.parametrize(
    "command", [RESUME, EVALUATE, REPORT], ids=["resume", "evaluate", "report"]
)
@pytest.mark.parametrize("name", ["checkpoints", "checkpoints/00000006", "events"])
def test_a_folder_of_a_run_that_is_a_link(name, command, theirs, mine, capsys):
    shutil.rmtree(theirs / name, ignore_errors=True)
    (theirs / name).symlink_to(mine)
    with untouched(mine):
        assert main([*command, str(theirs)]) == 1
    assert "link" in one_line(capsys)


def test_checkpoints_of_ones_own_loop_in_a_link(mine, tmp_path):
    (tmp_path / "link").symlink_to(mine)
    state = {"weight": np.ones(3, np.float32)}
    with untouched(mine), pytest.raises(OSError, match="a link, which is not followed"):
        checkpoints.save(tmp_path / "link", 3, state)
    with untouched(mine), pytest.raises(checkpoints.CheckpointError):
        checkpoints.restore(tmp_path / "link", state)


def test_a_page_beside_a_link(theirs, mine, tmp_path, capsys):
    (tmp_path / "page").symlink_to(mine)
    (tmp_path / "page.html").symlink_to(mine / "file")
    for checkpoint in (theirs / "checkpoints").glob("*.json"):
        checkpoint.unlink()
    with untouched(mine):
        assert main(["report", str(theirs), f"--out={tmp_path / 'page.html'}"]) == 1
    assert "a link, which is not followed" in one_line(capsys)


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "checkpoints/00000006.json"])
def test_a_pipe_holds_nobody_up(name, theirs, capsys):
    (theirs / name).unlink()
    os.mkfifo(theirs / name)
    for command in (EVALUATE, REPORT):
        if name.startswith("checkpoints"):
            continue  # as a manifest that is missing
        code = main([*command, str(theirs)])
        captured = capsys.readouterr()
        assert (code, "Traceback" in captured.err) in ((0, False), (1, False))


def images(root, classes=6, examples=4, colour=(0, 0, 200)):
    """Class folders of small images."""
    for number in range(classes):
        folder = root / f"class {number}"
        folder.mkdir(parents=True)
        for example in range(examples):
            Image.new("RGB", (9, 7), (number, example, colour[2])).save(folder / f"{example}.png")
    return root


CACHE = [
    ".memmeta",
    ".memmeta/folder",
    ".memmeta/folder/train.npy",
    ".memmeta/folder/manifest.json",
]


@pytest.mark.parametrize("name", [*CACHE, ".memmeta/folder/finished.jsonl", ".memmeta/folder.lock"])
def test_a_cache_that_is_a_link(name, tmp_path, mine):
    root = images(tmp_path / "data")
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    folder = name in CACHE[:2]
    (root / name).symlink_to(mine if folder else mine / "train.npy")
    with untouched(mine), pytest.raises(DataError, match="link"):
        load("folder", "train", root)


@pytest.mark.parametrize(
    "command", [RESUME, EVALUATE, REPORT], ids=["resume", "evaluate", "report"]
)
@pytest.mark.parametrize("data", ["folder", "mini_imagenet", "tfds:mnist", "npz", "omniglot"])
@pytest.mark.parametrize("named", [True, False], ids=["named", "default"])
def test_a_configuration_names_no_places(
    data, named, command, theirs, mine, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(mine))
    config = json.loads((theirs / "config.json").read_text())
    changes = {"data": data, "data_dir": str(mine) if named else None}
    (theirs / "config.json").write_text(json.dumps(config | changes))
    for manifest in (theirs / "checkpoints").glob("*.json"):
        found = json.loads(manifest.read_text())
        found["note"]["config"] |= changes  # they can alter that too
        manifest.write_text(json.dumps(found))
    with untouched(mine):
        assert main([*command, str(theirs)]) == 1
    said = one_line(capsys)
    assert "--data-dir" in said
    assert not named or str(mine) in said


@pytest.mark.slow
def test_the_person_names_the_place(tmp_path, capsys):
    data, run = images(tmp_path / "data"), tmp_path / "run"
    options = [*TINY, *QUICK, "--meta-steps=2", "--devices=1", "--image-size=20", "--ways=1"]
    options = [*options, "--data=folder", f"--data-dir={data}"]
    assert main(["train", "--run", str(run), *options]) == 0
    assert main(["evaluate", str(run)]) == 1
    assert f"wants to use the data set folder in {data}" in capsys.readouterr().err
    moved = Path(shutil.move(data, tmp_path / "elsewhere"))
    assert main(["evaluate", str(run), f"--data-dir={moved}"]) == 0
    again = ["train", "--resume", "--run", str(run), f"--data-dir={moved}", "--meta-steps=3"]
    assert main([*again, "--devices=1"]) == 0


def postscript(path):
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    return "cannot identify image file"


def immense(path):
    Image.new("1", (13_000, 13_000)).save(path)
    assert path.stat().st_size < 30_000
    return "169000000|13000 x 13000 pixels"


@pytest.mark.parametrize("attack", [postscript, immense])
def test_images_that_ask_too_much(attack, tmp_path):
    root = images(tmp_path / "data")
    message = attack(root / "class 1" / "1.png")
    with pytest.raises(DataError, match=rf"class 1/1\.png: not a whole image .*({message})"):
        load("folder", "train", root)


def test_a_pixel_limit_can_be_raised(tmp_path):
    root = images(tmp_path / "data", classes=3, examples=1)
    with pytest.raises(DataError, match="9 x 7 pixels, more than most_pixels=60"):
        load("folder", "train", root, Reading(limits=Limits(most_pixels=60)))
    load("folder", "train", root, Reading(limits=Limits(most_pixels=63)))


def bomb_zip(path):
    with zipfile.ZipFile(path.with_suffix(".zip"), "w", zipfile.ZIP_DEFLATED) as file:
        for number in range(6):
            file.writestr(f"{number}.png", bytes(2**24))


def bomb_tar(path):
    import tarfile

    with tarfile.open(f"{path}.tar.gz", "w:gz") as file:
        for number in range(6):
            member = tarfile.TarInfo(f"{number}.png")
            member.size = 2**24
            file.addfile(member, io.BytesIO(bytes(2**24)))


@pytest.mark.parametrize("write", [bomb_zip, bomb_tar])
def test_archives_that_unpack_to_too_much(write, tmp_path):
    write(tmp_path / "mini_imagenet")
    with pytest.raises(DataError, match=r"unpacks to more than 67108864 bytes; .* most_unpacked"):
        load("mini_imagenet", "train", tmp_path)
    assert len(list(tmp_path.iterdir())) == 1  # nothing is left of it
    with pytest.raises(DataError, match="no class folder"):
        load("mini_imagenet", "train", tmp_path, Reading(limits=Limits(most_unpacked=2**27)))


def many(file):
    for number in range(30):
        file.writestr(f"{number}.txt", "")
    return "holds more than 20 files; .* most_members"


def deep(file):
    file.writestr("a/" * 1200 + "1.png", "")
    return "folders inside one another"


def encrypted(file):
    file.writestr("1.png", b"words")
    file.filelist[0].flag_bits |= 1
    return "cannot be unpacked"


def unknown_packing(file):
    file.writestr("1.png", b"words")
    file.filelist[0].compress_type = 99
    return "cannot be unpacked"


@pytest.mark.parametrize("attack", [many, deep, encrypted, unknown_packing])
def test_archives_of_other_kinds(attack, tmp_path):
    with zipfile.ZipFile(tmp_path / "mini_imagenet.zip", "w") as file:
        message = attack(file)
    with pytest.raises(DataError, match=message):
        load("mini_imagenet", "train", tmp_path, Reading(limits=Limits(most_members=20)))
    assert len(list(tmp_path.iterdir())) == 1


def test_class_folders_in_latin_1(tmp_path, capsys):
    root = images(tmp_path / "data", classes=2)
    os.mkdir(os.fsencode(root) + b"/caf\xe9")
    with open(os.fsencode(root) + b"/caf\xe9/1.png", "wb") as file:
        Image.new("RGB", (5, 5)).save(file, "PNG")
    found = [load_host("folder", split, root) for split in ("train", "validation", "test")]
    names = {name for dataset in found for name in dataset.index.class_names}
    assert names == {"class 0", "class 1", "café"}


def test_nested_without_end(tmp_path, capsys):
    here = os.getcwd()
    root = tmp_path / "data"
    root.mkdir()
    try:
        os.chdir(root)
        for _ in range(1200):
            os.mkdir("a")
            os.chdir("a")
        os.chdir(root)
        with pytest.raises(DataError, match="folders inside one another"):
            load("folder", "train", root)
        (root / "config.json").write_text("{}")
        assert main(["evaluate", str(root)]) == 1
        assert "folders inside one another" in one_line(capsys)
    finally:
        os.chdir(here)
        os.system(f"rm -r '{root}'")  # deeper than Python's own removal goes


BIG = "1" + "0" * 400
RUBBISH = [
    *("", "[]", "null", "{", "[" * 100_000, '{"a": ' * 9000, '"text"', f'{{"step": {BIG}}}', "NaN"),
    *('{"accuracy": 3}', '{"accuracy": {"any styles": [1, 2]}}', '{"meta_steps": "many"}', "1e999"),
]


@pytest.mark.parametrize("text", RUBBISH, ids=range(len(RUBBISH)))
@pytest.mark.parametrize("name", ["report.json", "config.json"])
def test_a_file_of_the_wrong_kind(name, text, theirs, tmp_path, capsys):
    (theirs / name).write_text(text)
    shutil.rmtree(theirs / "checkpoints")  # nothing to compile for
    assert main(["report", str(theirs), f"--out={tmp_path / 'page.html'}"]) == 1
    assert name in one_line(capsys)


@pytest.mark.parametrize(
    "text", [f'{{"step": 1, "loss": {BIG}}}', '{"step": 2, "loss": [[1]]}', ""]
)
def test_lines_of_the_wrong_kind(text, theirs, tmp_path, capsys):
    file = theirs / "metrics.jsonl"
    rows = file.read_text().splitlines()
    rows[2] = text
    file.write_text("\n".join(rows))
    shutil.rmtree(theirs / "checkpoints")
    assert len(RunFolder(theirs).metrics()) == 5
    assert main(["report", str(theirs), f"--out={tmp_path / 'page.html'}"]) == 0


@pytest.mark.parametrize("name", ["[bold]run", "$x^{$", "_run", "<b>&café"])
def test_names_are_names(name, theirs, tmp_path, capsys):
    path = theirs.rename(tmp_path / name)
    arguments = ["train", "--run", str(path), "--resume", "--devices=1"]
    assert main(arguments) == 0
    shutil.rmtree(path / "checkpoints")  # nothing to compile for
    assert main(["report", str(path), "--episodes=2", f"--out={path / 'page.html'}"]) == 0
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    assert name in captured.out


def test_a_run_needs_a_name_that_is_unicode(theirs, tmp_path, capsys):
    path = theirs.rename(tmp_path / "caf\udce9")
    for command in (RESUME, EVALUATE, REPORT):
        assert main([*command, str(path)]) == 1
        assert "its name is no UTF-8" in one_line(capsys)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data=folder", "--data-dir=nowhere"], "is no folder"),
        (["--queries=50"], "queries=50"),
        (["--data=mini_imagenet", "--data-dir=."], "neither"),
        (["--background=plaid", "--data=folder", "--data-dir=data"], "background: expected"),
    ],
)
def test_a_start_that_fails_leaves_nothing(options, message, tmp_path, monkeypatch, capsys):
    images(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    before = snapshot(tmp_path)
    for place in ([], ["--run=runs/named"]):
        assert main(["train", *TINY, *QUICK, *place, *options]) == 1
        assert message in one_line(capsys)
    assert snapshot(tmp_path) == before


def test_a_folder_of_something_else_is_no_place_for_a_run(mine, capsys):
    before = snapshot(mine)
    assert main(["train", *TINY, *QUICK, "--run", str(mine)]) == 1
    assert "is no run; name a new or empty folder" in one_line(capsys)
    assert snapshot(mine) == before
