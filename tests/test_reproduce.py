"""The reproduction: its plan, one small run of it, what it goes on without, and that it resumes."""

import json
from dataclasses import replace

import pytest

from benchmarks.problems.as_released import SETTINGS, STAND_INS
from benchmarks.reproduce import _run
from benchmarks.reproduce.__main__ import arguments, available, plans, run_all, table
from benchmarks.reproduce._run import run

QUICK = arguments(["--quick"])


def test_every_method_is_planned_and_the_baselines_as_released_too():
    found = [(p.method, p.cached) for p in plans([SETTINGS[2]], arguments([]))]
    assert found == [
        ("memory_reduced", True),
        ("itd_bio", True),
        ("itd_bio", False),
        ("anil", True),
        ("anil", False),
        ("maml", True),
    ]
    assert len({p.name for p in plans(SETTINGS, arguments([]))}) == 24


@pytest.mark.slow
def test_a_run_goes_on_where_it_stopped(tmp_path, capsys, monkeypatch):
    longer = plans([STAND_INS[0]], QUICK)[0]
    first = replace(longer, setting=longer.setting._replace(iterations=1))
    with monkeypatch.context() as patched:
        patched.setattr(_run, "accuracy", lambda *_: None)  # stopped before the tests
        run(first, tmp_path / "run")
    found = run(longer, tmp_path / "run")
    assert found["theirs"][0] > 0
    assert found["fair"][0] > 0
    printed = capsys.readouterr().out
    assert printed.count("meta-step 1,") == printed.count("meta-step 2,") == 1


def test_missing_data_are_named_and_left_out(tmp_path, capsys):
    assert available(tmp_path) == []
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[1].strip() for line in lines] == [s.data for s in SETTINGS]
    assert all(str(tmp_path) in line for line in lines)


def test_the_table_is_made_of_what_was_found(tmp_path):
    made = plans(STAND_INS[:1], QUICK)
    line = {"seconds": 1.5, "megabytes": 20.0, "counted": False}
    tests = {"theirs": (50.0, 1.0), "fair": (60.0, 2.0)}
    results = {p.name: line | (tests if p.cached else {}) for p in made}
    lines = "".join(json.dumps({name: found}) + "\n" for name, found in results.items())
    (tmp_path / "results.jsonl").write_text(lines)
    assert run_all(made, tmp_path).keys() == results.keys()  # nothing is left to run
    rows = table(made, results).splitlines()
    assert rows[2] == (
        "| glyphs | memory_reduced | once | 50.0 ± 1.0 | 60.0 ± 2.0 | 20 compiled | 1.50 |  |"
    )
    assert rows[4] == "| glyphs | itd_bio | in every step |  |  | 20 compiled | 1.50 |  |"
