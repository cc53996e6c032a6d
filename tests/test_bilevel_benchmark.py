"""The benchmark of stochastic methods: a quick run, and its problems' minima."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import memmeta as mm
from benchmarks.bilevel import __main__ as command
from benchmarks.bilevel import problems


@pytest.mark.parametrize("name", problems.PROBLEMS)
def test_f_has_its_minimum_where_it_is_said(name):
    example = problems.PROBLEMS[name](512)
    for seed in range(3):
        theta = np.asarray(example.theta) + np.random.default_rng(seed).standard_normal(
            example.theta.shape
        )
        assert example.value(theta) > example.best


def test_f_is_that_of_the_losses():
    example = problems.quadratic(512)
    context = problems.Context(example.theta, *example.data)
    hessian = jax.hessian(example.problem.inner_loss)(np.zeros(problems.DIM, np.float32), context)
    slope = jax.grad(example.problem.inner_loss)(np.zeros(problems.DIM, np.float32), context)
    phi = -np.linalg.solve(np.asarray(hessian, np.float64), slope).astype(np.float32)
    found, _ = example.problem.outer_loss(phi, context)
    assert float(found) == pytest.approx(example.value(np.asarray(example.theta, float)), rel=1e-4)


def test_f_of_the_logistic_problem_has_the_gradient_of_the_library(x64):
    example = problems.logistic(512)
    wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64)[None], example.data)
    step = mm.make_meta_step(
        example.problem,
        mm.InnerLoop(mm.inner.newton(None), 12),
        mm.hypergradient.implicit(mm.linear_solve.direct()),
        optax.identity(),
    )
    theta = np.linspace(-3, 1, problems.FEATURES)
    gradient, metrics = step.gradient(step.init(jnp.asarray(theta)), wide)
    value, exact = problems.exact_logistic(example.data)(theta)
    assert float(metrics.loss) == pytest.approx(value, rel=1e-10)
    np.testing.assert_allclose(gradient, exact, rtol=1e-8, atol=1e-12)


@pytest.mark.slow
def test_a_quick_run(tmp_path, capsys):
    arguments = ["--quick", "--problem", "quadratic", "--repeats", "2", "--out", str(tmp_path)]
    found = command.main([*arguments, "--only", "soba", "f2sa"])
    assert json.loads((tmp_path / "bilevel.json").read_text())["quadratic"] == found["quadratic"]
    assert (tmp_path / "bilevel.png").stat().st_size > 10_000
    for row in found["quadratic"]["timed"]:
        assert row["θ apart"] < 1e-4  # the same numbers as by hand
    for each in found["quadratic"]["curves"].values():
        assert each["suboptimality"][-1] < each["suboptimality"][0]
    shown = capsys.readouterr().out
    assert "by hand, µs" in shown
    assert "exact by CG, µs" in shown
    assert found["quadratic"]["exact"]["ratio"] > 0
