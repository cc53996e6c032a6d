"""Memory of every estimator of the list: flat in the inner steps, or growing by its law."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
import pytest
from problems import head_example, network_example

import memmeta as mm
from memmeta.hypergradient import ESTIMATORS

pytestmark = pytest.mark.slow


def bytes_used(estimator, example, steps):
    """Temporary memory of the compiled estimator."""
    inner = mm.InnerLoop(optax.sgd(0.1), steps=steps)

    def call(theta, tasks):
        chunk = mm.hypergradient.Chunk.of(tasks)
        found = estimator(example.problem, inner, theta, chunk)
        return found.gradient, found.report

    compiled = jax.jit(call).lower(example.theta, example.tasks).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def large_example(heads):
    """Inner steps whose derivative needs their iterate, so that an estimator that keeps it shows.

    A loss that is not quadratic, and so many parameters that one iterate is far above the noise.
    """
    return head_example(1, support=30) if heads else network_example(1, hidden=256)


def one_iterate(example):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(example.problem.init(example.theta)))


@pytest.mark.parametrize("heads", [False, True])
def test_a_leak_would_show(heads):
    """On the same problems reverse mode keeps at least one iterate for each further step."""
    example, unrolled = large_example(heads), ESTIMATORS["unrolled"].make()
    few, many = bytes_used(unrolled, example, 16), bytes_used(unrolled, example, 256)
    assert many - few >= (256 - 16) * one_iterate(example)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_memory_grows_as_stated(name):
    """Flat in K where promised; else by its law, read off K = 16, 64, 256."""
    entry = ESTIMATORS[name]
    example, estimator = large_example(entry.heads), entry.make()
    few, many = bytes_used(estimator, example, 16), bytes_used(estimator, example, 256)
    if entry.memory == "flat":
        assert many <= few + 64
        return
    some = bytes_used(estimator, example, 64)
    ratio = (many - some) / (some - few)
    laws = {"linear": (3.6, 4.4), "root": (1.5, 3.0), "logarithmic": (0.5, 1.6)}
    assert laws[entry.memory][0] < ratio < laws[entry.memory][1]
    assert many - few >= one_iterate(example)


def test_memory_of_implicit_is_the_same_to_the_byte():
    estimator, example = mm.hypergradient.implicit(), large_example(heads=False)
    assert len({bytes_used(estimator, example, steps) for steps in (1, 10, 1000)}) == 1


def test_sample_space_keeps_no_state_of_the_size_of_the_features():
    """What grows with the features is the Gram matrices and their pull-back, once."""
    samples, ways = 6 + 7, 3

    def wide(features):
        def init(theta):
            return {"kernel": jnp.zeros((features, ways)), "bias": jnp.zeros(ways)}

        example = head_example(1)
        problem = dataclasses.replace(example.problem, init=init)
        return example._replace(problem=problem, theta={"body": jnp.ones((4, features))})

    estimator = mm.hypergradient.sample_space(estimate_error=False)
    growth = bytes_used(estimator, wide(1064), 50) - bytes_used(estimator, wide(64), 50)
    assert growth < 4 * 1000 * (4 * samples + 4 * ways)
