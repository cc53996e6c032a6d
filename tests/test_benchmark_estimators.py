"""The benchmark of all estimators: a quick run, and a second one that keeps the first's figures."""

import json

import pytest

from benchmarks.cost import estimators


@pytest.mark.slow
def test_a_quick_run(tmp_path, capsys):
    quick = ["--quick", "--out", str(tmp_path)]
    estimators.main([*quick, "--problem", "head", "--only", "implicit"])
    found = estimators.main([*quick, "--problem", "network", "--only", "implicit", "reptile"])
    assert json.loads((tmp_path / "estimators.json").read_text()) == found
    assert (tmp_path / "estimators.png").stat().st_size > 10_000
    assert {problem: list(names) for problem, names in found.items()} == {
        "head": ["implicit"],
        "network": ["implicit", "reptile"],
    }
    for problem in found:
        one, ten = found[problem]["implicit"]
        assert (one["T"], ten["T"]) == estimators.QUICK_STEPS
        assert one["bytes"] == ten["bytes"]
        assert 0 < ten["range"][0] <= ten["seconds"] <= ten["range"][1]
    one, ten = found["head"]["implicit"]
    assert ten["error"] < one["error"]
    assert "implicit" in capsys.readouterr().out
