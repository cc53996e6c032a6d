"""A causal transformer whose adapters adapt: flat memory, the right gradient, its benchmark."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import optax
import pytest
from assertions import relative_error

import memmeta as mm
from benchmarks.cost import transformer as benchmark
from benchmarks.harness.programs import compiled, temporary_megabytes
from benchmarks.problems import transformer as problem
from memmeta.hypergradient import implicit, unrolled
from memmeta.linear_solve import cg
from memmeta.models import linear_head

pytestmark = pytest.mark.slow

POINTS = 4


def adapted(layers=1, width=8, points=POINTS):
    """A small network, and with adapters of rank 1."""
    network = problem.transformer(layers, width, points)
    return network, problem.with_adapters(network, 1)


def test_memory_is_flat_in_the_inner_steps_and_that_of_fine_tuning():
    """In compiled bytes, on one task; the linear solve and the mixed product take turns."""
    plain, network = adapted(width=16, points=16)
    functions = problem.Functions(support=2, query=2, points=16)
    tasks = jax.eval_shape(lambda: functions.sample_batch(jax.random.key(0), 1))

    def implicit_megabytes(steps):
        made = problem.learner(network, "implicit", steps)
        step = made.make_meta_step(optax.sgd(0.1))
        state = jax.eval_shape(lambda: step.init(made.init(jax.random.key(0))))
        return temporary_megabytes(compiled(step.gradient, state, tasks))

    few, many = implicit_megabytes(4), implicit_megabytes(64)
    assert many == few
    gradient = jax.grad(partial(problem.plain_loss, plain))
    params = jax.eval_shape(plain.init, jax.random.key(0))
    assert few < 1.8 * temporary_megabytes(compiled(gradient, params, tasks))


def test_the_network_is_causal_and_its_head_reads_sequences():
    network, _ = adapted()
    assert network.head is not linear_head  # whose features have two axes
    params = network.init(jax.random.key(0))
    tokens = jax.random.normal(jax.random.key(1), (1, POINTS, 3))

    def answers(tokens):
        return network.head(params["head"], network.body(params["body"], tokens, jnp.ones(1)))

    change = jnp.abs(answers(tokens) - answers(tokens.at[0, 2].add(1.0)))[0, :, 0]
    assert jnp.all(change[:2] == 0)
    assert jnp.all(change[2:] > 0)


@pytest.mark.slow
def test_both_rules_agree_where_the_adapters_have_converged(x64):
    _, network = adapted(width=4)
    functions = problem.Functions(support=2, query=2, points=POINTS)
    tasks = functions.sample_batch(jax.random.key(0), 1)
    theta = jax.tree.map(jnp.float64, network.init(jax.random.key(1)))
    made = problem.learner(network, "implicit", 1, proximal=20.0)
    inner = mm.InnerLoop(mm.inner.gradient_descent(), 300)
    gradients = []
    for rule in (implicit(cg(40)), unrolled()):
        step = mm.make_meta_step(made.problem, inner, rule, optax.sgd(0.1))
        with jax.numpy_dtype_promotion("standard"):  # layer norms of flax mix dtypes
            gradients.append(jax.jit(step.gradient)(step.init(theta), tasks)[0])
    assert relative_error(*gradients) < 1e-6


@pytest.mark.slow
def test_a_run_of_the_benchmark(tmp_path, capsys):
    sizes = {"steps": 2, "layers": 1, "width": 8, "rank": 1, "points": POINTS, "tasks": 2}
    lengths = {"meta-steps": 2, "first-steps": 2, "held-out": 2, "unrolled-to": 1}
    arguments = [f"--{name}={value}" for name, value in (sizes | lengths).items()]
    rows = benchmark.main([*arguments, "--out", str(tmp_path)])
    found = json.loads((tmp_path / "transformer.json").read_text())
    assert found["rows"] == rows
    assert [row["seconds"] for row in rows if row["rule"] == "unrolled"] == ["not run"]
    assert [line["rule"] for line in found["health"]] == ["implicit"]
    assert "plain fine-tuning" in capsys.readouterr().out
