"""Every method by its name: it runs, reports, and gives the gradient of what it says it does."""

import inspect

import chex
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
    """Quick to compile, and smooth, so that differences see its derivatives: tanh of 7x7 means."""

    def init(key):
        keys = jax.random.split(key)
        body = {"kernel": jax.random.normal(keys[0], (16, 12)), "bias": jnp.zeros(12)}
        head = {"kernel": 0.3 * jax.random.normal(keys[1], (12, 3)), "bias": jnp.zeros(3)}
        return {"body": body, "head": head}

    def body(params, images, weights):
        means = jnp.mean(images.reshape(-1, 4, 7, 4, 7), axis=(2, 4)) / 255
        return jnp.tanh(means.reshape(-1, 16) @ params["kernel"] + params["bias"])

    return mm.models.Network(init, body, mm.models.linear_head, features=12, ways=3)


OPTIONS = {
    "memory_reduced": {"inner": mm.InnerLoop(steps=200), "cg_steps": 60},
    "imaml": {"inner": mm.InnerLoop(steps=200), "cg_steps": 60},
    "stocbio": {"inner": mm.InnerLoop(steps=200), "terms": 400},
    "amigo": {"inner": mm.InnerLoop(steps=200), "cg_steps": 60},
    "anil": {"inner": mm.InnerLoop(optax.sgd(0.1), steps=3)},
    "itd_bio": {"inner": mm.InnerLoop(optax.sgd(0.1), steps=3)},
}
"""So many steps that what is left is rounding, where the inner solution is differentiated.

A fixed rate where the steps are: a measured one is held fixed in derivatives, and moves in losses.
"""
FIRST_ORDER = ("fomaml", "reptile")
"""Their steps are not the gradient of the loss that they report; that of pzobo is on average."""


@pytest.mark.parametrize("name", METHODS)
def test_every_method_follows_its_loss(name, tasks):
    """Along its hypergradient d the loss rises by ‖d‖, in central differences, or at least rises.

    And evaluation, with the training's inner loop, gives the training's losses.
    """
    learner = METHODS[name](network(), **OPTIONS.get(name, {}))
    step = learner.make_meta_step(optax.sgd(1.0), task_chunk=2)
    state, run = step.init(learner.init(jax.random.key(1))), jax.jit(step.gradient)
    gradient, metrics = run(state, tasks)
    assert metrics.counts.masked == 0
    norm = float(optax.tree.norm(gradient))

    def loss_at(distance):
        scale = jnp.float32(distance / norm)
        moved = jax.tree.map(lambda t, g: t + scale * g, state.meta_params, gradient)
        return float(run(state._replace(meta_params=moved), tasks)[1].loss)

    slope = (loss_at(1e-2) - loss_at(-1e-2)) / 2e-2
    if name in FIRST_ORDER:
        assert slope > 0
    elif name != "pzobo":
        assert slope == pytest.approx(norm, rel=1e-3)
    judged = jax.jit(learner.evaluate)(state.meta_params, tasks)
    np.testing.assert_allclose(judged.loss, metrics.tasks.loss, rtol=1e-4)


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
    chex.assert_trees_all_close(*gradients, atol=2e-4)


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
    chex.assert_trees_all_close(*found, rtol=1e-2, atol=1e-4)


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


@pytest.mark.parametrize("name", METHODS)
def test_every_method_takes_the_loss_it_is_given(name, tasks):
    learner = METHODS[name](network(), loss=lambda outputs, targets: jnp.full(len(targets), 3.0))
    problem, theta = learner.problem, learner.init(jax.random.key(1))
    context = problem.embed(theta, jax.tree.map(lambda leaf: leaf[0], tasks))
    assert problem.outer_loss(problem.init(theta), context)[0] == 3.0
