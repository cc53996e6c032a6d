"""The accuracy benchmark from its command to its table; regression and its Gaussian process."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import memmeta as mm
from benchmarks.accuracy import methods, published, regression, runs, settings, table
from benchmarks.accuracy.settings import Setting, Sizes
from memmeta.few_shot.algorithms import METHODS
from memmeta.models import mlp
from memmeta.problem import Task

pytestmark = pytest.mark.slow

TINY = Sizes(4, 2, 2, 2, 3, 0.0, episodes=4, meta_steps=2)


def quick(tmp_path, *arguments):
    methods.main([*arguments, "--quick", "--out", str(tmp_path)])
    return table.read(tmp_path / "accuracy.jsonl")


def test_curves_from_the_command_to_the_table_and_not_run_again(tmp_path, monkeypatch, capsys):
    asked = ["--data", "tides", "--shots", "5", "--method", "anil", "--seeds"]
    first = quick(tmp_path, *asked, "0", "1")
    assert [record["seed"] for record in first] == [0, 1]
    assert all(np.isfinite(record["figures"]["transductive"]["10"]["mean"]) for record in first)
    assert set(first[0]["figures"]["transductive"]) == {"10", "20"}
    assert first[0]["meta_steps"] == 3
    assert first[0]["temporary_megabytes"] > 0
    assert (tmp_path / "accuracy.png").stat().st_size > 5_000
    assert "**tides, 5 points**" in capsys.readouterr().out

    (tmp_path / "accuracy.jsonl").write_text(json.dumps(first[0]) + "\n" + '{"data": "ti')
    asked_for = []

    def never(job, seeds, data_dir, meta_steps):
        asked_for.append((job.method, seeds, meta_steps))
        return iter([first[1]])

    monkeypatch.setattr(methods, "results", never)
    assert quick(tmp_path, *asked, "0", "1") == first
    assert asked_for == [("anil", [1], 3)]
    assert quick(tmp_path, *asked, "0", "1") == first
    assert len(asked_for) == 1
    assert quick(tmp_path, "--table") == first
    with pytest.raises(SystemExit, match="holds no finished result yet"):
        quick(tmp_path / "elsewhere", "--table")


def test_classes_at_both_statistics_and_both_numbers_of_steps(monkeypatch):
    """The one program that judges says what `Learner.evaluate` says of each case by itself."""
    setting = Setting("glyphs", 3, 1)
    test = mm.data.load("glyphs", "test")
    small = lambda ways, **_: mlp(ways, (6,), (28, 28, 1))  # noqa: E731
    monkeypatch.setattr(settings, "conv4", small)
    job = runs.Job(setting, TINY, "fomaml", "tuned", "test")
    recipe = settings.recipe_of("tuned", setting, "fomaml")
    learner = settings.make_learner(setting, TINY, test, "fomaml", recipe)
    theta = learner.init(jax.random.key(3))
    found = runs.evaluation_program(job, test)(theta, test)
    assert set(found) == {"transductive", "support"}
    episodes = mm.data.Episodes(3, 1, TINY.test_queries)
    tasks = episodes.sample_batch(test, jax.random.key(0), TINY.episodes)
    steps = learner.inner.steps
    for count in (steps, 2 * steps):
        inner = mm.InnerLoop(learner.inner.solver, count)
        judged = jax.jit(partial(learner.evaluate, inner=inner))(theta, tasks)
        expected = np.asarray(judged.aux["accuracy"])
        for figures in found.values():  # this network has no statistics
            assert figures[str(count)]["mean"] == pytest.approx(expected.mean())


def test_statistics_at_test_change_what_is_judged():
    setting = Setting("glyphs", 2, 1)
    test = mm.data.load("glyphs", "test")
    job = runs.Job(setting, TINY, "protonet", "tuned", "test")
    recipe = settings.Recipe()
    learners = {
        kind: settings.make_learner(setting, TINY, test, "protonet", recipe, kind)
        for kind in ("transductive", "support")
    }
    theta = learners["support"].init(jax.random.key(0))
    found = runs.evaluation_program(job, test)(theta, test)
    assert [list(figures) for figures in found.values()] == [["0"], ["0"]]
    tasks = mm.data.Episodes(2, 1, 3).sample_batch(test, jax.random.key(0), TINY.episodes)
    for kind, learner in learners.items():
        expected = np.asarray(jax.jit(learner.evaluate)(theta, tasks).aux["accuracy"])
        assert found[kind]["0"]["mean"] == pytest.approx(expected.mean())


def test_meta_steps_are_counted_out_by_the_clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(runs, "clock", lambda: now[0])

    def run(count):
        now[0] += 0.25 * count

    assert runs.meta_steps_in(30.0, run) == 120
    assert runs.meta_steps_in(0.0, run) == 1


def test_the_rate_falls_along_a_cosine_over_the_meta_steps_asked_for():
    setting = Setting("tides", 1, 5)
    train = mm.data.load("tides", "train")
    job = runs.Job(setting, TINY, "r2d2", "tuned", "test")
    recipe = settings.recipe_of("tuned", setting, "r2d2")
    learner = settings.make_learner(setting, TINY, train, "r2d2", recipe)
    block, start = runs.train_program(job, learner, train)
    for count, total in ((1, 4), (3, 4), (2, 2)):
        state, _ = block(start(jax.random.key(0)), train, jnp.int32(count), jnp.int32(total))
        expected = recipe.rate * 0.5 * (1 + np.cos(np.pi * (count - 1) / total))
        rate = state.optimizer.hyperparams["learning_rate"]
        np.testing.assert_allclose(rate, expected, rtol=1e-5)
        assert int(state.step) == count


def record(method, seed, mean, **changes):
    figures = {"0": {"mean": mean, "half_width": 0.01}}
    job = runs.Job(Setting("omniglot", 5, 1), TINY, method, "tuned", "test")
    cost = {"meta_steps": 7, "seconds": 2.0, "temporary_megabytes": 3.0}
    both = {"transductive": figures, "support": figures}
    return job.identity(seed) | cost | {"figures": both} | changes


def test_table_from_lines_alone(tmp_path):
    path = tmp_path / "deep" / "accuracy.jsonl"
    for line in (
        record("imaml", 0, 0.5),
        record("maml", 0, 0.6),
        record("imaml", 1, 0.52),
        record("maml", 0, 0.7, preset="authors"),
    ):
        table.append(path, line)
    shown = table.table(table.read(path))
    rows = [line for line in shown.splitlines() if line.startswith("| ")][2:]
    names = [row.split(" | ")[0].removeprefix("| ") for row in rows]
    assert names == ["maml, as the authors ran it", "maml", "imaml"]  # the best first
    assert "| 51.0 ± 1.0 | – |" in rows[2]
    assert "| 0 | 7 | 2.0 | 3.0 | 2 (50.0–52.0) | 99.2 ± 0.4 [1] |" in rows[2]
    assert shown.endswith("- [1] Rajeswaran, Finn, Kakade, Levine (NeurIPS 2019), Table 2.")
    assert "published" not in table.table([record("maml", 0, 0.6, data="glyphs")])
    path.write_text("{}\nno json\n{}\n")
    with pytest.raises(ValueError, match=r"line 2: expected JSON, found 'no json'"):
        table.read(path)


def test_only_equal_seconds_are_compared():
    longer = record("maml", 0, 0.7, sizes=TINY._replace(seconds=60.0)._asdict())
    both = [record("imaml", 0, 0.5), longer]
    assert list(table.cases(both)) == [
        "omniglot, 5-way 1-shot, 0 s",
        "omniglot, 5-way 1-shot, 60 s",
    ]


def test_the_docs_show_what_was_measured():
    docs = Path(__file__).parents[1] / "docs"
    page = (docs / "results.md").read_text(encoding="utf-8")
    tables = table.table(table.read(docs / "assets" / "accuracy.jsonl"))
    for each in tables.split("\n\n**"):
        assert each.strip() in page
    assert published.table() in page


def test_presets_of_the_authors_are_theirs_alone(capsys):
    setting = Setting("cifar_fs", 5, 5)
    recipe = settings.recipe_of("authors", setting, "memory_reduced")
    assert (recipe.rate, recipe.inner.steps, recipe.options, recipe.statistics) == (
        1e-4,
        20,
        {"ridge": 0.0, "cg_steps": 20},
        "separate",
    )
    assert settings.sizes_of(setting).width == 64
    assert settings.sizes_of(Setting("mini_imagenet", 5, 5)).width == 32
    with pytest.raises(SystemExit, match=r"authors ran memory_reduced, itd_bio, .*found r2d2"):
        methods.main(["--data", "glyphs", "--preset", "authors", "--method", "r2d2"])
    with pytest.raises(SystemExit, match=r"same_inner is for anil and itd_bio on classes"):
        methods.main(["--data", "tides", "--preset", "same_inner"])
    with pytest.raises(SystemExit, match="unknown data set 'glyfs'"):
        methods.main(["--data", "glyfs", "--method", "maml", "--quick"])


def test_the_authors_networks_start_as_theirs():
    """Scales from U(0, 1), and one random head for the methods that do not learn it."""
    setting, train = Setting("glyphs", 3, 1), mm.data.load("glyphs", "train")
    heads = []
    for method in ("memory_reduced", "itd_bio"):
        recipe = settings.recipe_of("authors", setting, method)
        learner = settings.make_learner(setting, TINY, train, method, recipe)
        theta = learner.init(jax.random.key(0))
        scales = theta["body"]["ConvBlock_0"]["scale"]
        assert 0 <= scales.min() < scales.max() < 1
        start = learner.problem.init(theta)  # of all parameters where features are recomputed
        heads.append(start.get("head", start))
    assert np.abs(heads[0]["kernel"]).min() > 0
    jax.tree.map(np.testing.assert_array_equal, *heads)


@pytest.mark.parametrize("method", [name for name in METHODS if name not in regression.WITHOUT])
def test_every_method_has_squared_losses(method):
    """Outer loss ½ mean (prediction − target)² where the inner loop ends; R2-D2's by NumPy."""
    widths = (3,) if method == "boil" else ()  # without hidden layers there is no body to adapt
    learner = regression.learner(method, mlp(1, widths, (1,)))
    task = line_task()
    theta = learner.init(jax.random.key(0))
    context = learner.problem.embed(theta, task)
    params = learner.inner(learner.problem, learner.problem.init(theta), context)
    loss, aux = learner.problem.outer_loss(params, context)
    assert float(loss) == pytest.approx(float(aux["error"]) / 2)
    if method == "r2d2":
        design = np.c_[task.support_inputs, np.ones(5)]
        matrix = design.T @ design / 5 + 0.1 * np.eye(2)
        line = np.linalg.solve(matrix, design.T @ np.asarray(task.support_targets) / 5)
        expected = np.c_[task.query_inputs, np.ones(4)] @ line
        error = np.mean((expected - np.asarray(task.query_targets)) ** 2)
        assert float(aux["error"]) == pytest.approx(error, rel=1e-4)


def line_task():
    """Points of y = 3 x + 1."""
    x = jnp.linspace(-1.0, 1.0, 9)[:, None]
    return Task(x[:5], 3 * x[:5] + 1, x[5:], 3 * x[5:] + 1)


def test_a_regression_head_and_a_whole_network_agree_where_they_are_the_same():
    """A network without hidden layers is all head: MAML errs as ANIL does."""
    network, inner = mlp(1, (), (1,)), mm.InnerLoop(optax.sgd(0.1), 3)
    task = line_task()
    errors = []
    for method in ("maml", "anil"):
        learner = regression.learner(method, network, inner=inner)
        theta = network.init(jax.random.key(0))
        context = learner.problem.embed(theta, task)
        params = inner(learner.problem, learner.problem.init(theta), context)
        errors.append(float(learner.problem.outer_loss(params, context)[1]["error"]))
    assert errors[0] == pytest.approx(errors[1], rel=1e-5)


def test_prototypes_have_no_curves():
    with pytest.raises(ValueError, match=r"method: protonet classifies by class means"):
        regression.learner("protonet", mlp(1, (), (1,)))


def test_gaussian_process_in_closed_form(monkeypatch, x64):
    """The largest marginal likelihood on the grid, and its posterior mean, by NumPy."""
    grid, noises = np.array([0.2, 0.7, 3.0]), np.array([1e-4, 1e-2])
    monkeypatch.setattr(regression, "LENGTHS", grid)
    monkeypatch.setattr(regression, "NOISES", noises)
    rng = np.random.default_rng(0)
    x, points = rng.uniform(-1, 1, (6, 1)), rng.uniform(-1, 1, (4, 1))
    y, expected = np.sin(4 * x), np.sin(4 * points)

    def density(length, noise, scale):
        matrix = scale * (np.exp(-0.5 * ((x - x.T) / length) ** 2) + noise * np.eye(6))
        _, logarithm = np.linalg.slogdet(2 * np.pi * matrix)
        return -0.5 * (y.T @ np.linalg.solve(matrix, y)).item() - 0.5 * logarithm

    scales = np.geomspace(1e-3, 1e6, 3000)
    cases = [(max(density(s, n, v) for v in scales), s, n) for s in grid for n in noises]
    _, length, noise = max(cases)
    matrix = np.exp(-0.5 * ((x - x.T) / length) ** 2) + noise * np.eye(6)
    found = np.exp(-0.5 * ((points - x.T) / length) ** 2) @ np.linalg.solve(matrix, y)
    error = regression.gaussian_process(Task(*map(jnp.asarray, (x, y, points, expected))))
    assert float(error) == pytest.approx(float(np.mean((found - expected) ** 2)), rel=1e-8)
