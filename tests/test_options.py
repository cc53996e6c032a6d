"""Options of the command line: they fit together, and messages name them as they are given."""

import json
from dataclasses import replace

import numpy as np
import pytest
from test_command_line import SMALL, last_line, run  # noqa: F401

from memmeta import algorithms
from memmeta.__main__ import main
from memmeta.data import DataError, Episodes, Reading, load, load_host
from memmeta.runs import Config, make_trainer
from memmeta.runs._fitting import fitting
from memmeta.runs._methods import described, options_of
from memmeta.runs._options import in_options

NAMES = (
    *("ridge", "ways", "shots", "queries", "data", "test_queries", "data_dir", "most_pixels"),
    "image_size",
)


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("ridge: expected 0 or more", "--ridge: expected 0 or more"),
        ("ways=9 is too many; use ways <= 5", "--ways=9 is too many; use --ways <= 5"),
        ("use shots + test_queries <= 5", "use --shots + --test-queries <= 5"),
        ("folder: data_dir is not given", "folder: --data-dir is not given"),
        ("more than most_pixels=60", "more than --most-pixels=60"),
        ("/data_dir/ways=3.png: my data: no", "/data_dir/ways=3.png: my data: no"),
        ("say --data-dir FOLDER", "say --data-dir FOLDER"),
        ("c.json: unknown: 'data_dir'", "c.json: unknown: 'data_dir'"),
        ("data and image_size: no", "--data and --image-size: no"),
        ("uneven=True takes them", "--uneven takes them"),
    ],
)
def test_messages_in_the_words_of_the_command_line(message, said):
    assert in_options(message, (*NAMES, "uneven"), ["uneven"]) == said


@pytest.mark.parametrize("data", ["glyphs", "emoji"])
@pytest.mark.parametrize("shots", [1, 5])
def test_defaults_fit_all_data_of_the_package(data, shots, caplog):
    trainer = make_trainer(Config(data=data, shots=shots, method="protonet", width=2, tasks=1))
    assert trainer.usual.queries == min(15, {"glyphs": 20, "emoji": 12}[data] - shots)
    if data == "emoji":
        assert "query examples of each class, where 15 are usual" in caplog.text
    families = {"glyphs": "different font families", "emoji": "different designers"}
    assert list(trainer.judged)[1] == families[data]


def test_what_cannot_fit_is_said_of_the_default():
    glyphs = load("glyphs", "test")
    assert fitting(Episodes(shots=17), [glyphs]).queries == 3
    impossible = Episodes(shots=20)
    assert fitting(impossible, [glyphs]) == impossible
    with pytest.raises(DataError, match=r"shots \+ queries <= 20"):
        impossible.check(glyphs)


@pytest.mark.parametrize("method", algorithms.METHODS)
def test_the_help_of_a_method_has_its_own_options(method, capsys):
    own = options_of(method)
    with pytest.raises(SystemExit):
        main(["train", "--method", method, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for name, default in own.items():
        said = f"--{name.replace('_', '-')}" + ("" if default is None else f" {default}")
        assert said in shown
    assert described(method).splitlines()[1] in shown


VALUES = {
    **{"ridge": 0.2, "proximal": 1.0, "cg_steps": 2, "terms": 3, "directions": 2},
    **{"first_rate": 0.1, "recompute_features": True, "adapts": "Conv_3|head"},
    **{"head_start": "random", "inner_steps": 1, "inner_rate": 0.1},
}


@pytest.mark.parametrize("method", [name for name in algorithms.METHODS if name != "amigo"])
def test_a_method_takes_its_own_options_and_no_other(method):
    own = options_of(method)
    assert own.keys() <= VALUES.keys()
    given = {name: VALUES[name] for name in own}
    if "recompute_features" in own:
        given["ridge"] = 0.0  # which such features are without
    config = Config(method=method, width=2, **given)
    learner = config.learner((16, 16, 1))
    if "inner_steps" in own:
        assert learner.inner.steps == 1
    for name in VALUES.keys() - own.keys():
        with pytest.raises(ValueError, match=f"{name}: expected no value, as {method} has no such"):
            replace(config, **{name: VALUES[name]}).learner((16, 16, 1))


def test_images_too_small_for_the_network(tmp_path, capsys):
    assert main(["train", "--run", str(tmp_path / "run"), *SMALL, "--image-size=8"]) == 1
    assert "--image-size: 8x8 cannot be halved 4 times" in last_line(capsys)


def test_a_pattern_that_is_none():
    with pytest.raises(ValueError, match="adapts: expected head, body, all or a regular expr"):
        Config(method="maml", adapts="[").learner((16, 16, 1))


@pytest.mark.parametrize("name", ["glyphs", "emoji"])
def test_images_of_any_data_at_any_size(name):
    own = load(name, "test")
    other = 3 if own.example_shape[-1] == 1 else 1
    found = load(name, "test", reading=Reading(size=12, channels=other))
    assert found.inputs.shape == (*own.inputs.shape[:2], 12, 12, other)
    assert found.inputs.dtype == np.uint8
    assert found.inputs.std() > 20  # it shows something
    same = load(name, "test", reading=Reading(size=own.example_shape[0]))
    np.testing.assert_array_equal(own.inputs, same.inputs)
    assert load_host(name, "test", reading=Reading(size=12)).rows.shape[1] == 12


def test_colours_and_greys():
    glyphs = load("glyphs", "test")
    coloured = load("glyphs", "test", reading=Reading(channels=3))
    for channel in range(3):
        np.testing.assert_array_equal(coloured.inputs[..., channel], glyphs.inputs[..., 0])


def test_curves_have_no_size():
    with pytest.raises(DataError, match="channels and image_size: sinusoid has curves"):
        load("sinusoid", "train", reading=Reading(channels=1))


def test_evaluation_on_other_data(run, capsys):  # noqa: F811
    assert main(["evaluate", str(run), "--data=emoji", "--episodes=2"]) == 1
    assert "--image-size and --channels give them the shape" in last_line(capsys)
    options = ["--data=emoji", "--episodes=2", "--image-size=28", "--channels=1"]
    assert main(["evaluate", str(run), *options]) == 0
    assert "different designers" in capsys.readouterr().out


def test_a_run_at_another_size(tmp_path):
    options = [*SMALL, "--image-size=16", "--channels=3", "--method=protonet", "--meta-steps=2"]
    options = [option for option in options if option != "--head-start=random"]
    options = [option for option in options if not option.startswith("--inner-steps")]
    assert main(["train", "--run", str(tmp_path / "run"), *options]) == 0
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (stored["image_size"], stored["channels"]) == (16, 3)
