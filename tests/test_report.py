"""`memmeta report`: one page that needs nothing else, true to the run, for runs of every state."""

import dataclasses
import json
import re
import shutil
from html import unescape

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memmeta.__main__ import main
from memmeta.runs import RunFolder, checkpoints, make_trainer
from memmeta.runs.report import judge_all, write

pytestmark = pytest.mark.slow

SMALL = [
    "--ways=3",
    "--queries=2",
    "--test-queries=2",
    "--devices=1",
    "--width=4",
    "--tasks=2",
    "--meta-steps=2",
    "--log-every=1",
    "--checkpoint-every=2",
    "--episodes=2",
    "--inner-steps=5",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of one small finished run."""
    path = tmp_path_factory.mktemp("runs") / "first"
    assert main(["train", "--run", str(path), *SMALL]) == 0
    return path


@pytest.fixture(scope="module")
def judged(run):
    return judge_all([run], episodes=2)[0]


def page_of(found, folder):
    """The text of the page that shows those runs."""
    write(found, folder / "report.html", episodes=2)
    return (folder / "report.html").read_text(encoding="utf-8")


def remarks_on(found, folder):
    """What the page says in words about the health of one run."""
    said = re.search('<ul class="remarks">(.*?)</ul>', page_of([found], folder))[1]
    return [unescape(remark) for remark in re.findall("</span>: (.*?)</li>", said)]


def test_the_page_shows_the_run(run, judged, tmp_path):
    page = tmp_path / "report.html"
    written = write([judged], page, episodes=2)
    text = page.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>")
    for words in ("Query loss", "Test accuracy by group", "Georgian", "Linear residual", "Memory"):
        assert words in text
    final = json.loads((run / "report.json").read_text())
    assert f"{100 * final['accuracy']['any styles']['mean']:.1f} ±" in text
    # three classes: a support example and two query examples of each
    assert text.count('src="data:image/png;base64,') == 9
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written[1:])
    assert {path.stem for path in written} >= {"loss", "accuracy", "groups", "memory", "episode"}


def test_the_command_writes_the_page(run, tmp_path, capsys):
    page = tmp_path / "both.html"
    assert main(["report", str(run), str(run), f"--out={page}", "--episodes=2"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == str(page)
    assert page.read_text(encoding="utf-8").count("<h3>") > 2
    assert main(["report", str(tmp_path / "none")]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_page_needs_no_network(judged, tmp_path):
    text = page_of([judged], tmp_path)
    addresses = set(re.findall(r"(?:src|href|url)[=(]\"?([^\s\")]+)", text))
    assert all(a.startswith(("data:", "#")) for a in addresses), addresses
    assert "<script" not in text
    assert "prefers-color-scheme: dark" in text


def test_names_inside_the_page_are_its_own(judged, tmp_path):
    text = page_of([judged], tmp_path)
    names = re.findall(r' id="([^"]+)"', text)
    assert len(names) == len(set(names))
    assert set(re.findall(r'href="#([^"]+)"', text)) <= set(names)


def test_runs_stand_side_by_side(judged, tmp_path):
    other = dataclasses.replace(judged, name="<second>")
    text = page_of([judged, other], tmp_path)
    assert "<title>memmeta: first and &lt;second&gt;</title>" in text
    assert "<second>" not in text
    assert "var(--run-1)" in text


def test_a_run_that_has_just_begun_is_shown(run, tmp_path):
    begun = tmp_path / "begun"
    begun.mkdir()
    shutil.copy(run / "config.json", begun)
    (found,) = judge_all([begun], episodes=2)
    assert found.step is None
    assert remarks_on(found, tmp_path) == ["no log point yet"]


def test_folders_of_one_name_are_told_apart(run, tmp_path):
    paths = []
    for parent in ("a", "b"):
        paths.append(tmp_path / parent / "run")
        paths[-1].mkdir(parents=True)
        shutil.copy(run / "config.json", paths[-1])
    assert [found.name for found in judge_all(paths, episodes=2)] == ["a/run", "b/run"]


def test_probabilities_are_those_of_the_head(run, judged):
    """Read off the outer loss alone, against the softmax of the logits."""
    folder = RunFolder(run)
    trainer = make_trainer(folder.config())
    state = checkpoints.restore(folder.checkpoints, trainer.init())
    problem, task = trainer.learner.problem, jax.tree.map(jnp.asarray, judged.episode.task)
    context = problem.embed(state.meta_params, task)
    params = trainer.learner.inner(problem, problem.init(state.meta_params), context)
    logits = context.query_features @ params["kernel"] + params["bias"]
    np.testing.assert_allclose(judged.episode.after, jax.nn.softmax(logits), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(judged.episode.before, 1 / 3, rtol=1e-4)


def test_remarks_say_what_went_wrong(judged, tmp_path):
    assert remarks_on(judged, tmp_path) == [
        "nothing unusual: every task was finite, and every linear system was solved"
    ]
    unsolved = judged.lines[-1] | {"linear_iterations": 0.0}
    said = remarks_on(dataclasses.replace(judged, lines=[unsolved]), tmp_path)
    assert said == ["nothing unusual: every task was finite"]
    line = judged.lines[-1] | {"masked": 3, "linear_residual": 0.5}
    best = line | {"validation_accuracy": 0.9, "validation_interval": 0.01}
    last = line | {"step": 3, "validation_accuracy": 0.2, "validation_interval": 0.01}
    said = " ".join(remarks_on(dataclasses.replace(judged, lines=[best, last]), tmp_path))
    assert "6 tasks were not finite" in said
    assert "left 50 % of its right-hand side" in said
    assert "fell from 90.0 % at meta-step 2 to 20.0 %" in said


def test_drawings_take_the_colours_of_the_page(judged, tmp_path):
    drawings = re.findall("<svg .*?</svg>", page_of([judged], tmp_path), flags=re.DOTALL)
    assert len(drawings) > 3
    for drawing in drawings:
        assert "var(--ink)" in drawing
        assert "#1d2430" not in drawing
        assert not re.match('<svg [^>]*(width|height)="', drawing)
