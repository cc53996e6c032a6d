"""Every method by its name: it trains, reports, and gives the gradient of what it says it does."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import memmeta as mm
from memmeta.data import Episodes, load
from memmeta.few_shot.algorithms import METHODS


@pytest.fixture(scope="module")
def tasks():
    return Episodes(3, 1, 2).sample_batch(load("glyphs", "train"), jax.random.key(0), 4)


def network():
    """Small, and quick to compile."""
    return mm.models.mlp(3, widths=(12,), input_shape=(28, 28, 1), head_scale=1.0)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns(name, tasks):
    learner = METHODS[name](network())
    step = learner.make_meta_step(optax.adam(1e-2), task_chunk=2)
    theta = learner.init(jax.random.key(1))
    state, losses = step.init(theta), []
    for _ in range(8):
        state, metrics = step(state, tasks)
        losses.append(float(metrics.loss))
    assert metrics.counts.masked == 0
    assert np.isfinite(losses).all()
    assert min(losses[1:]) < losses[0]
    judged = learner.evaluate(state.meta_params, tasks)
    assert judged.loss.shape == (4,)
    assert np.isfinite(judged.loss).all()


@pytest.mark.parametrize("name", ["anil", "itd_bio"])
def test_features_computed_once_are_the_same_numbers(name, tasks):
    inner = mm.InnerLoop(optax.sgd(0.1), steps=3)
    # The support's own statistics: the one pass of cached features is then the pass of each step.
    options = {"inner": inner, "statistics": "support"}
    cached = METHODS[name](network(), **options)
    recomputed = METHODS[name](network(), recompute_features=True, **options)
    theta = cached.init(jax.random.key(1))
    gradients = []
    for learner in (cached, recomputed):
        step = learner.make_meta_step(optax.sgd(0.1))
        gradients.append(step.gradient(step.init(theta), tasks)[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), *gradients)


def test_the_papers_hypergradient_agrees_with_long_unrolling(tasks):
    """At convergence the implicit rule and the differentiated steps are the same gradient."""
    inner = mm.InnerLoop(steps=400)
    implicit = mm.algorithms.memory_reduced(network(), inner=inner, ridge=0.5, cg_steps=40)
    unrolled = mm.algorithms.itd_bio(network(), inner=inner, ridge=0.5)
    theta = implicit.init(jax.random.key(1))
    found = []
    for learner in (implicit, unrolled):
        step = learner.make_meta_step(optax.sgd(0.1))
        found.append(step.gradient(step.init(theta), tasks)[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-4), *found)


def test_as_released_is_within_reach(tasks):
    learner = mm.algorithms.memory_reduced(
        network(), inner=mm.InnerLoop(optax.sgd(0.1), steps=20), ridge=0
    )
    step = learner.make_meta_step(optax.adam(1e-3))
    _, metrics = step(step.init(learner.init(jax.random.key(0))), tasks)
    assert np.isfinite(metrics.gradient_norm)


def test_a_named_subset_adapts(tasks):
    problem = mm.few_shot.network_problem(
        network(), lambda path: path.endswith("bias"), proximal=0.0
    )
    learner = mm.algorithms.Learner(
        problem, mm.InnerLoop(optax.sgd(0.1), 2), mm.hypergradient.unrolled(), network().init
    )
    theta = learner.init(jax.random.key(0))
    assert all(leaf.ndim == 1 for leaf in jax.tree.leaves(problem.init(theta)))
    step = learner.make_meta_step(optax.sgd(0.1))
    gradient, _ = step.gradient(step.init(theta), tasks)
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(gradient))


def test_wrong_options_are_named():
    with pytest.raises(ValueError, match=r"chooses no parameter\. Expected 'head', 'body'"):
        mm.few_shot.network_problem(network(), lambda path: False, proximal=0.0)
    with pytest.raises(ValueError, match="ridge: expected a finite number, 0 or more, found -1"):
        mm.algorithms.memory_reduced(network(), ridge=-1)
    with pytest.raises(
        ValueError, match="proximal: expected a finite number, 0 or more, found nan"
    ):
        mm.algorithms.imaml(network(), proximal=float("nan"))


def test_every_method_has_a_source():
    for method in METHODS.values():
        assert "Source:" in inspect.getdoc(method)
