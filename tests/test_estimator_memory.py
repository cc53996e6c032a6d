"""Memory of every estimator of the list: flat in the inner steps, or growing by its law."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
import pytest
from problems import (
    head_example,
    logistic_example,
    network_example,
    quadratic_example,
    quadratic_problem,
    quadratic_tasks,
)

import memmeta as mm
from memmeta.hypergradient import ESTIMATORS


def bytes_used(estimator, example, steps):
    """Temporary memory of the compiled estimator."""
    inner = mm.InnerLoop(optax.sgd(0.1), steps=steps)

    def call(theta, tasks):
        chunk = mm.hypergradient.Chunk.of(tasks)
        found = estimator(example.problem, inner, theta, chunk)
        return found.gradient, found.report

    compiled = jax.jit(call).lower(example.theta, example.tasks).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def large_example(name, size=256):
    """Flat memory shows on any problem; what grows is what a non-linear step has to keep."""
    entry = ESTIMATORS[name]
    if entry.heads:
        return head_example(1, support=30)
    if name == "reptile":
        return network_example(1, hidden=size)
    if entry.memory != "flat":
        return logistic_example(1, features=size)
    size = min(size, 32)
    tasks = quadratic_tasks(jax.random.key(1), tasks=1, inner=size)
    return quadratic_example()._replace(problem=quadratic_problem(inner=size), tasks=tasks)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_memory_grows_as_stated(name):
    """Flat in K where promised; else by its law, read off K = 16, 64, 256."""
    entry = ESTIMATORS[name]
    example, estimator = large_example(name), entry.make()
    few, many = bytes_used(estimator, example, 16), bytes_used(estimator, example, 256)
    if entry.memory == "flat":
        assert many <= few + 64
        return
    some = bytes_used(estimator, example, 64)
    ratio = (many - some) / (some - few)
    laws = {"linear": (3.6, 4.4), "root": (1.5, 3.0), "logarithmic": (0.5, 1.6)}
    assert laws[entry.memory][0] < ratio < laws[entry.memory][1]
    assert many - few > 4 * 256  # one state of φ at least: it is no noise that was measured


def test_memory_of_implicit_is_the_same_to_the_byte():
    estimator, example = mm.hypergradient.implicit(), large_example("implicit")
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
