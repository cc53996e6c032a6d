"""Numbers at the edges: half precision that lives on, integers, no ridge, keys, float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import head_example, quadratic_tasks

import memmeta as mm
from memmeta.hypergradient import Chunk, implicit, sample_space
from memmeta.linear_solve import cg, minres
from memmeta.meta import WarmStart


def warm_run(start, read):
    """The inner parameters of two tasks after 60 warm meta-steps of one small inner step each."""
    problem = mm.Problem(
        embed=lambda theta, target: (theta, target),
        inner_loss=lambda phi, c: 0.5 * jnp.sum((read(phi) - c[1] - 0 * c[0]) ** 2),
        outer_loss=lambda phi, c: (jnp.sum(read(phi) ** 2), {}),
        init=lambda theta: start,
        smoothness=lambda c: jnp.float32(20.0),
    )
    inner = mm.InnerLoop(mm.inner.gradient_descent(), steps=1)
    step = WarmStart(mm.make_meta_step(problem, inner, implicit(cg(1)), optax.sgd(0.0)), size=2)
    targets = jnp.array([101.0, 99.0])
    state = step.init(jnp.ones(()), targets)
    for _ in range(60):
        state, _ = step(state, targets)
    return state.memory.params


def test_warm_starts_in_half_precision_move_by_small_steps():
    """A step of 5 % of the distance is below bfloat16's rounding at 100: it must not be lost."""
    found = warm_run(jnp.bfloat16(100.0), lambda phi: phi.astype(jnp.float32))
    np.testing.assert_allclose(found, [101.0, 99.0], atol=0.6)
    assert found.dtype == jnp.float32
    assert float(found[0]) > 100.4 > 99.6 > float(found[1])


def test_warm_starts_of_parameters_with_integer_leaves():
    start = {"x": jnp.float32(100.0), "n": jnp.int32(3)}
    found = warm_run(start, lambda phi: phi["x"] * (phi["n"] / 3).astype(jnp.float32))
    np.testing.assert_allclose(found["x"], [100.95, 99.05], atol=0.05)


def test_without_a_ridge_an_error_is_not_known():
    example = head_example(tasks=2, ridge=0.0)
    inner = mm.InnerLoop(mm.inner.gradient_descent(), steps=5)
    run = jax.jit(lambda t: sample_space()(example.problem, inner, t, Chunk.of(example.tasks)))
    found = run(example.theta)
    assert found.usable.all()
    assert np.isinf(found.report.error_estimate).all()


def test_the_proximal_term_is_as_precise_as_the_network(x64):
    network = mm.models.Network(
        init=lambda key: {"body": jnp.ones(2), "head": jnp.ones((2, 3))},
        body=lambda params, inputs, weights: inputs * params,
        head=lambda params, features: features @ params,
        features=2,
        ways=3,
    )
    problem = mm.few_shot.network_problem(network, "all", proximal=0.7)
    theta = jax.tree.map(lambda x: x.astype(jnp.float64) / 3, network.init(jax.random.key(0)))
    labels = jnp.array([-1, -1])  # padding: the proximal term alone is left
    task = mm.Task(jnp.ones((2, 2)), labels, jnp.ones((2, 2)), labels)
    context = problem.embed(theta, task)
    moved = jax.tree.map(lambda x: x + 0.1, theta)
    slope = jax.grad(problem.inner_loss)(moved, context)
    for leaf in jax.tree.leaves(slope):
        np.testing.assert_allclose(leaf, 0.07, rtol=1e-14)


def test_random_directions_are_drawn_from_no_key_of_the_caller():
    """Not from fold_in(key, 0), fold_in(key, 1), …, which draw θ and the tasks of a run."""
    tasks, met = quadratic_tasks(jax.random.key(1)), []

    def estimator(problem, inner, meta_params, chunk):
        jax.debug.callback(lambda data: met.append(data.tolist()), jax.random.key_data(chunk.key))
        return mm.hypergradient.first_order()(problem, inner, meta_params, chunk)

    key = jax.random.key(3)
    problem = mm.Problem(
        embed=lambda theta, task: (theta, task.target),
        inner_loss=lambda phi, c: jnp.sum((phi - c[1]) ** 2) + jnp.sum(c[0]) * phi[0],
        outer_loss=lambda phi, c: (jnp.sum(phi**2) + jnp.sum(c[0]), {}),
        init=lambda theta: jnp.zeros(6),
    )
    step = mm.make_meta_step(problem, mm.InnerLoop(steps=1), estimator, optax.sgd(0.1))
    state = step.init(jnp.ones(2), key)
    for _ in range(3):
        state, _ = step(state, tasks)
    jax.effects_barrier()
    theirs = [jax.random.key_data(jax.random.fold_in(key, n)).tolist() for n in range(64)]
    assert len({tuple(each) for each in met}) == 3
    assert not [each for each in met if each in theirs]


@pytest.mark.parametrize("solver", [cg, minres])
def test_a_small_system_takes_no_more_products_than_it_can_use(solver, x64):
    made = []

    def product(x):
        jax.debug.callback(lambda: made.append(1))
        return jnp.array([2.0, 5.0]) * x

    found = solver(20)(product, jnp.array([2.0, 10.0]))
    jax.block_until_ready(found)
    jax.effects_barrier()
    np.testing.assert_allclose(found.value, [1.0, 2.0], rtol=1e-12)
    # twice the dimension, the residual, and two of a product of which no problem says its symmetry
    assert len(made) <= 2 * 2 + 1 + 2


def test_options_that_a_method_would_not_read_are_refused():
    network = mm.models.mlp(3, (8,), (4,))
    with pytest.raises(ValueError, match="ridge: expected 0 where features are recomputed"):
        mm.algorithms.anil(network, ridge=0.1, recompute_features=True)
    with pytest.raises(ValueError, match="ridge: expected 0 where features are recomputed"):
        mm.algorithms.itd_bio(network, ridge=0.1, recompute_features=True)
    with pytest.raises(TypeError, match="cg_steps"):
        mm.algorithms.stocbio(network, cg_steps=5)


def test_both_tolerances_together_are_named():
    example = head_example(tasks=2)
    inner = dataclasses.replace(mm.InnerLoop(steps=10), tolerance=1e-3)
    step = mm.make_meta_step(example.problem, inner, implicit(tolerance=1e-2), optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"^tolerance: .*rounds of implicit\(tolerance"):
        step(step.init(example.theta), example.tasks)
