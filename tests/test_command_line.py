"""The command line as a person meets it: a small real run, resuming, all kinds of bad input."""

import json
import os
import shutil
import sys
from dataclasses import replace
from functools import partial
from importlib.metadata import version

import jax
import numpy as np
import pandas
import pytest

from memmeta import models
from memmeta.__main__ import main
from memmeta.data import Augmentation, Episodes, Warp, load, normalisation
from memmeta.runs import (
    Config,
    RunFolder,
    UserError,
    checkpoints,
    make_trainer,
    new_run,
    train,
)

pytestmark = pytest.mark.slow

SMALL = [
    *(
        "--ways=3",
        "--queries=2",
        "--test-queries=2",
        "--width=4",
        "--tasks=2",
        "--meta-steps=6",
        "--log-every=2",
    ),
    *("--checkpoint-every=2", "--episodes=4", "--inner-steps=5", "--devices=1"),
    "--head-start=random",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of one small finished run."""
    path = tmp_path_factory.mktemp("runs") / "run"
    assert main(["train", "--run", str(path), "--tensorboard", *SMALL]) == 0
    return path


def parameters(path):
    folder = RunFolder(path)
    return make_trainer(folder.config()).restored(folder.checkpoints)[1]


def last_line(capsys):
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    return lines[0]


def test_a_run_leaves_everything_behind(run):
    metrics = pandas.read_json(run / "metrics.jsonl", lines=True)
    assert metrics["step"].tolist() == [2, 4, 6]
    assert np.isfinite(metrics[["loss", "accuracy", "gradient_norm"]]).all().all()
    report = json.loads((run / "report.json").read_text())
    assert set(report["accuracy"]) == {"any styles", "different font families"}
    assert report["meta_step_temporary_bytes"] > 0
    assert len(list(run.glob("events.out.tfevents.*"))) == 1
    assert (run / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert RunFolder(run).config().ways == 3
    assert checkpoints.whole(run / "checkpoints") == [6, 4, 2]


def test_evaluate(run, capsys):
    assert main(["evaluate", str(run), "--episodes", "3", "--test-steps", "50"]) == 0
    assert "3 episodes" in capsys.readouterr().out


def with_another_initialisation(monkeypatch):
    """From now on networks start otherwise, and so do the heads that a seed gives."""
    monkeypatch.setattr(models, "conv4", partial(models.conv4, initialisation="xavier_uniform"))


def test_a_random_head_is_that_of_the_checkpoint(run, monkeypatch, capsys):
    outputs = []
    for _ in range(2):
        assert main(["evaluate", str(run), "--test-steps=0"]) == 0  # the head alone decides
        outputs.append(capsys.readouterr().out)
        with_another_initialisation(monkeypatch)
    assert outputs[0] == outputs[1]
    another = make_trainer(RunFolder(run).config())
    with pytest.raises(UserError, match="hold another random head than the trainer"):
        train(another, another.compile(), RunFolder(run), resume=True)


def test_resuming_gives_the_uninterrupted_run_bit_for_bit(run, tmp_path, monkeypatch):
    """Where heads start is in the checkpoints, so that a newer default changes nothing."""
    with_another_initialisation(monkeypatch)
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    for step in (4, 6):
        (copy / "checkpoints" / f"{step:08d}.json").unlink()
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "torn')
    assert main(["train", "--run", str(copy), "--resume", "--devices=1"]) == 0
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.tree.map(_plain, parameters(run)),
        jax.tree.map(_plain, parameters(copy)),
    )
    timing = ["tasks_per_second"]
    first, second = (
        pandas.read_json(path / "metrics.jsonl", lines=True).drop(columns=timing)
        for path in (run, copy)
    )
    pandas.testing.assert_frame_equal(first, second)
    first, second = (json.loads((path / "report.json").read_text()) for path in (run, copy))
    assert first["accuracy"] == second["accuracy"]


def _plain(leaf):
    if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf)


def test_an_altered_checkpoint_is_passed_over(run, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    for folder in sorted((copy / "checkpoints").glob("0*"))[::-1]:
        if folder.is_dir():
            largest = max(folder.rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
            data = bytearray(largest.read_bytes())
            data[len(data) // 2] ^= 1
            largest.write_bytes(data)
            found = checkpoints.whole(copy / "checkpoints")
            if folder.name == f"{found[0]:08d}":
                assert int(parameters(copy).step) == found[1]
    assert main(["evaluate", str(copy)]) == 1
    assert "every checkpoint was altered" in last_line(capsys)


def test_a_checkpoint_of_another_model(run):
    other = make_trainer(replace(RunFolder(run).config(), width=6)).init()
    with pytest.raises(checkpoints.CheckpointError, match="a checkpoint of another model"):
        checkpoints.restore(run / "checkpoints", other)


@pytest.mark.parametrize("command", [["evaluate"], ["report"], ["train", "--resume", "--run"]])
def test_a_configuration_altered_after_the_fact(command, run, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rate": 0.5}))
    (copy / "checkpoints" / "00000006.json").unlink()  # so that there is something to resume
    assert main([*command, str(copy)]) == 1
    assert "rate is 0.5, but the newest checkpoint was made with 0.003" in last_line(capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ridge", "-1"], "--ridge: expected 0 or more, found -1.0"),
        (["--rate", "-0.1"], "--rate: expected more than 0, found -0.1"),
        (["--inner-rate", "nan"], "--inner-rate: expected a finite number or nothing, found nan"),
        (["--tasks", "0"], "--tasks: expected at least 1, found 0"),
        (["--tasks", "4", "--task-chunk", "3"], "--task-chunk: expected a divisor of --tasks=4"),
        (["--test-queries", "50"], "--test-queries=50"),
        (["--network", "conv5"], "--network conv5: expected conv4, resnet12, mlp or module:"),
        (["--network", "module:nowhere:make"], "--network module:nowhere:make: No module named"),
        (["--network", "module:json:dumps"], "--network module:json:dumps"),
        (["--checkpoint-every", "3"], "--checkpoint-every: expected a multiple of --log-every"),
        (["--data", "nothing"], "unknown data set 'nothing'"),
        (["--ways", "5000"], "--ways=5000 is too many"),
        (["--shots", "30"], "--shots=30"),
        (["--resume"], "--resume: name the run folder"),
    ],
)
def test_bad_options_end_in_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *SMALL, *arguments]) == 1
    assert message in last_line(capsys)


OWN = {
    "uneven": ("def make(ways, image_shape):\n    return 1 / 0", "ZeroDivisionError: division by"),
    "unfinished": ("def make(", "`import unfinished`: SyntaxError"),
    "narrow": ("def make(ways):\n    return ways", "called with (ways, image_shape): TypeError"),
    "other": ("def make(ways, image_shape):\n    return ways", "returned int, expected a memmeta"),
}


@pytest.mark.parametrize("name", OWN)
def test_a_network_of_the_current_folder(name, tmp_path, monkeypatch, capsys):
    """It is found, and what is wrong in it is said in one line."""
    text, message = OWN[name]
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert main(["train", *SMALL, "--network", f"module:{name}:make"]) == 1
    assert message in last_line(capsys)


def test_the_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"memmeta {version('memmeta')}\n"


def test_defaults_fit_together():
    assert [Config(log_every=every).saved_every for every in (40, 50, 7, 1000)] == [
        *(240, 250, 238, 1000)
    ]


@pytest.mark.parametrize("name", ["resnet12", "mlp"])
def test_networks_by_name(name):
    made = Config(network=name, width=4, dtype="bfloat16").made_network((28, 28, 1))
    assert made.ways == 5


def test_runs_are_compared_on_the_same_episodes(run, tmp_path, capsys):
    other = shutil.copytree(run, tmp_path / "other")
    assert main(["compare", str(run), str(other), "--episodes=4"]) == 0
    assert "+0.00 ± 0.00" in capsys.readouterr().out
    assert main(["compare", str(run)]) == 1
    assert "at least two run folders" in last_line(capsys)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"shots": 2}))
    assert main(["compare", str(run), str(other)]) == 1
    assert "its shots is 2" in last_line(capsys)


def test_code_of_a_stored_run_is_run_only_where_named(run, tmp_path, capsys):
    """A folder may come from somebody else."""
    other = shutil.copytree(run, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"network": "module:os:abort"}))
    (other / "checkpoints" / "00000006.json").unlink()
    resume = ["train", "--resume", "--run"]
    for command in (["evaluate"], ["report"], ["compare", str(run)], resume):
        assert main([*command, str(other)]) == 1
        line = last_line(capsys)
        assert "wants to run code" in line or "network is module:os:abort" in line


def test_a_folder_that_holds_a_run_is_not_overwritten(run, capsys):
    before = (run / "metrics.jsonl").read_bytes()
    assert main(["train", "--run", str(run), *SMALL]) == 1
    assert "already holds a run" in last_line(capsys)
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_folder_in_use(tmp_path, capsys):
    with new_run(tmp_path / "run", Config()):
        assert main(["train", "--run", str(tmp_path / "run"), "--resume"]) == 1
    assert "in use by another process" in last_line(capsys)


def test_options_of_a_resumed_run_stay(run, capsys):
    assert main(["train", "--run", str(run), "--resume", "--rate", "0.5"]) == 1
    assert "--rate: was 0.003 in this run, found 0.5" in last_line(capsys)


@pytest.mark.parametrize(
    "text", ["", "[1]", '{"ways": "many"}', '{"nonsense": 1}', '{"ridge": -1}']
)
def test_a_configuration_that_is_none(text, tmp_path, capsys):
    (tmp_path / "config.json").write_text(text)
    assert main(["evaluate", str(tmp_path)]) == 1
    assert "config.json" in last_line(capsys)


def test_a_folder_that_is_no_run(tmp_path, capsys):
    assert main(["evaluate", str(tmp_path / "nowhere")]) == 1
    assert "not the folder of a run" in last_line(capsys)


def test_a_folder_that_cannot_be_written(tmp_path, capsys):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    assert main(["train", "--run", str(blocked / "run"), *SMALL]) == 1
    assert "cannot be written" in last_line(capsys)


def test_the_configuration_survives_a_round_trip():
    config = Config(ways=7, inner_rate=0.5)
    assert Config.from_json(config.to_json(), "here") == config


def test_augmentation_is_for_training_and_normalisation_for_both():
    train = load("glyphs", "train")
    config = Config(warp=0.2, crop=2, flip=True, normalise=True)
    statistics, normalised = normalisation(train), config.normalised(train)
    sampler = config.training_episodes(train, normalised)
    assert sampler.augmentation == Augmentation(Warp(0.2, 0.2, 0.2, 0.1), 2, True, *statistics)
    assert sampler.cross_family
    one_family = Config(cross_family=False)
    assert not one_family.training_episodes(train, normalised).cross_family
    plain, other = config.test_episodes(train, normalised).values()
    assert plain == Episodes(queries=15, augmentation=Augmentation(None, 0, False, *statistics))
    assert other == replace(plain, queries=5, cross_family=True)


@pytest.fixture
def cache_option(monkeypatch):
    """Lets a test choose the cache of compiled programs, and puts it back."""
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    yield lambda: jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", before)


def any_command(folder):
    """A command that ends at once; like all of them it first says where compiled programs are."""
    assert main(["evaluate", str(folder / "no run")]) == 1


def test_compiled_programs_are_private(cache_option, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    any_command(tmp_path)
    folder = tmp_path / "memmeta" / "compiled"
    assert cache_option() == str(folder)
    assert folder.stat().st_mode & 0o777 == 0o700


def of_the_current_directory(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    return "is below the current directory"


def for_all_to_write(folder, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    (folder / "memmeta" / "compiled").mkdir(parents=True)
    (folder / "memmeta" / "compiled").chmod(0o777)
    return "can be written by others"


def below_one_for_all(folder, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    (folder / "memmeta" / "compiled").mkdir(parents=True)
    (folder / "memmeta").chmod(0o775)
    return "can be written by others"


def of_another(folder, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    (folder / "memmeta" / "compiled").mkdir(parents=True)
    os.chown(folder / "memmeta" / "compiled", 54321, 54321)
    return "belongs to another user"


def chosen_and_open(folder, monkeypatch):
    folder.chmod(0o777)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder))
    return "can be written by others"


KINDS = [of_the_current_directory, for_all_to_write, below_one_for_all, chosen_and_open]
KINDS += [of_another] if os.geteuid() == 0 else []


@pytest.mark.parametrize("kind", KINDS)
def test_programs_of_others_are_not_run(kind, cache_option, tmp_path, monkeypatch, capsys):
    (tmp_path / "place").mkdir()
    message = kind(tmp_path / "place", monkeypatch)
    any_command(tmp_path)
    assert cache_option() is None
    assert message in capsys.readouterr().err


def test_a_relative_cache_counts_as_not_set(cache_option, tmp_path, monkeypatch):
    (tmp_path / "stranger").mkdir()
    monkeypatch.chdir(tmp_path / "stranger")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", ".")
    (tmp_path / "home").mkdir()
    any_command(tmp_path)
    assert cache_option() == str(tmp_path / "home" / ".cache" / "memmeta" / "compiled")
    monkeypatch.setenv("HOME", "here")
    any_command(tmp_path)
    assert cache_option() is None
    assert not list((tmp_path / "stranger").iterdir())
