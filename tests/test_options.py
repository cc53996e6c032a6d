"""Options of the command line: they fit together, and messages name them as they are given."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from test_command_line import SMALL, last_line, run  # noqa: F401

from memmeta import algorithms
from memmeta.__main__ import main
from memmeta.data import DataError, Reading, load, load_host
from memmeta.runs import Config, make_trainer

pytestmark = pytest.mark.slow


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
    config = Config(data="glyphs", shots=10, method="protonet", width=2, tasks=1)
    assert make_trainer(config).usual.queries == 10
    with pytest.raises(DataError, match="use shots <= 10"):
        make_trainer(replace(config, shots=20))


HEAD = {"inner_steps", "inner_rate", "ridge", "head_start"}
WHOLE = {"inner_steps", "inner_rate", "adapts"}
OWN = {
    "memory_reduced": HEAD | {"cg_steps"},
    "maml": WHOLE,
    "anil": HEAD - {"head_start"} | {"recompute_features"},
    "fomaml": WHOLE,
    "reptile": WHOLE,
    "boil": WHOLE - {"adapts"},
    "imaml": WHOLE | {"proximal", "cg_steps"},
    "itd_bio": HEAD | {"recompute_features"},
    "stocbio": HEAD | {"terms"},
    "amigo": HEAD | {"cg_steps"},
    "pzobo": HEAD | {"directions"},
    "meta_sgd": {"inner_steps", "inner_rate", "first_rate"},
    "r2d2": {"ridge"},
    "protonet": set(),
}
"""The options of each method besides those of all."""


@pytest.mark.parametrize("method", algorithms.METHODS)
def test_the_help_of_a_method_has_its_own_options(method, capsys):
    with pytest.raises(SystemExit):
        main(["train", "--method", method, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    listed = re.search(r"Its own options and their defaults: ([^.]*(?:\.\d[^.]*)*)\.", shown)
    named = re.findall(r"--([a-z-]+)", listed[1]) if listed else []
    assert {name.replace("-", "_") for name in named} == OWN[method]


VALUES = {
    **{"ridge": 0.2, "proximal": 1.0, "cg_steps": 2, "terms": 3, "directions": 2},
    **{"first_rate": 0.1, "recompute_features": True, "adapts": "Conv_3|head"},
    **{"head_start": "random", "inner_steps": 1, "inner_rate": 0.1},
}


@pytest.mark.parametrize("method", [name for name in algorithms.METHODS if name != "amigo"])
def test_a_method_takes_its_own_options_and_no_other(method):
    own = OWN[method]
    given = {name: VALUES[name] for name in own}
    if "recompute_features" in own:
        given["ridge"] = 0.0  # which such features are without
    config = Config(method=method, width=2, **given)
    learner = config.learner((16, 16, 1))
    if "inner_steps" in own:
        assert learner.inner.steps == 1
    for name in VALUES.keys() - own:
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
