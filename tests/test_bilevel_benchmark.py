"""The benchmark of stochastic methods: a quick run, and its problems' minima."""

import json

import jax
import numpy as np
import pytest

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
    assert "by hand, µs" in capsys.readouterr().out
