"""The benchmark of data cleaning: a quick run, its data files, and what it refuses."""

import gzip
import json

import numpy as np
import pytest

from benchmarks.hyper_cleaning import __main__ as command
from benchmarks.hyper_cleaning import data, methods, problem, tune


@pytest.mark.slow
def test_a_quick_run_is_made_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(problem, "FINAL_STEPS", 300)
    arguments = ["--quick", "--model", "linear", "--only", "implicit, CG", "--passes", "400"]
    first = command.main([*arguments, "--out", str(tmp_path)])
    figures = {row["method"]: row for row in first}
    assert figures["no weights"]["accuracy"] < figures["clean half"]["accuracy"]
    assert figures["implicit, CG"]["accuracy"] > figures["no weights"]["accuracy"]
    assert figures["implicit, CG"]["F1"] > 0.7
    assert figures["implicit, CG"]["steps"] == 18
    shown = capsys.readouterr().out
    assert "clean half, validation" in shown
    assert "(no weights)" in shown
    monkeypatch.setattr(command, "result", None)  # nothing is run again
    again = command.main([*arguments, "--out", str(tmp_path)])
    assert [row["accuracy"] for row in again] == [row["accuracy"] for row in first]


@pytest.mark.slow
def test_settings_are_tried_without_a_look_at_the_test(tmp_path, monkeypatch):
    monkeypatch.setattr(problem, "FINAL_STEPS", 100)
    found = tune.main(["--quick", "--only", "F2SA", "--out", str(tmp_path)])
    assert [(row["rate"], row["outer"]) for row in found] == [
        (settings.rate, settings.outer) for settings in methods.CHOICES["F2SA"]
    ]
    assert all(0 <= row["validation"] <= 1 for row in found)
    lines = (tmp_path / "tune.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == found


def test_every_method_has_settings():
    assert methods.CHOICES.keys() == methods.METHODS.keys()


def test_half_of_the_labels_are_wrong_and_the_parts_are_apart():
    rows = data.stand_in(500, 0)
    # The first number says which image it is; the second one is its label.
    inputs = np.stack([np.arange(500.0), rows.labels], axis=1)
    found = data.cleaning(rows._replace(inputs=inputs), 200, 100, 3)
    true = found.train.inputs[:, 1] - found.train.inputs[:, 1].min()
    wrong = found.train.labels != np.round(true)
    np.testing.assert_array_equal(wrong, found.corrupted)
    assert wrong.sum() == 100
    parts = [part.inputs[:, 0] for part in (found.train, found.validation, found.test)]
    assert len(set(np.round(np.concatenate(parts), 3))) == 500


def test_both_kinds_of_files_are_read(tmp_path):
    images, labels = np.arange(6 * 784, dtype=np.uint32).astype(np.uint8), np.arange(6) % 10
    for split, part in (("train", slice(0, 4)), ("t10k", slice(4, 6))):
        shown = images.reshape(6, -1)[part].tobytes()
        named = labels.astype(np.uint8)[part].tobytes()
        path = tmp_path / f"{split}-images-idx3-ubyte.gz"
        path.write_bytes(gzip.compress(bytes(16) + shown))
        path = tmp_path / f"{split}-labels-idx1-ubyte.gz"
        path.write_bytes(gzip.compress(bytes(8) + named))
    found = data.read("fashion", tmp_path)
    np.testing.assert_array_equal(found.labels, labels)
    np.testing.assert_allclose(found.inputs.ravel() * 255, images, rtol=1e-6)

    digits = tmp_path / "package" / "src" / "digits"
    digits.mkdir(parents=True)
    for digit in range(10):
        path = digits / f"{digit}.json"
        path.write_text(json.dumps({"data": [digit / 10] * 784 * 2}))
    found = data.read("digits", tmp_path / "package")
    np.testing.assert_allclose(found.inputs[:, 0], found.labels / 10, rtol=1e-6)
    assert np.bincount(found.labels).tolist() == [2] * 10


@pytest.mark.parametrize(("name", "remedy"), [("fashion", "apt install"), ("digits", "npm")])
def test_missing_data_are_one_line_with_the_remedy(tmp_path, name, remedy):
    arguments = ["--data", name, "--data-dir", str(tmp_path), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match=remedy) as found:
        command.main(arguments)
    assert "\n" not in str(found.value)
    assert str(tmp_path) in str(found.value)
