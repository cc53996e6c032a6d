"""The counts that continuous integration compares, and an option that saves some of them."""

import jax
import jax.numpy as jnp
import numpy as np
from problems import quadratic_example

import memmeta as mm
from benchmarks.problems import ridges
from benchmarks.problems.workloads import Workload
from benchmarks.regress import grown, is_convolution, is_pass, made_by, with_named_body
from memmeta.hypergradient import implicit
from memmeta.models import conv4, mlp


def test_what_grew_is_named_and_what_shrank_is_not():
    limits = {"maml": {"bytes": 100.0, "FLOPs": 100.0, "convolutions": 8}}
    found = {"maml": {"bytes": 102.0, "FLOPs": 50.0, "convolutions": 8, "compilations": 1}}
    assert [line[""] for line in grown(found, limits)] == ["GREW", "", "", "NEW"]


def test_convolutions_are_counted_as_often_as_loops_run():
    network = conv4(2, width=16, depth=1, image_shape=(4, 4, 16))
    params, images = network.init(jax.random.key(0))["body"], jnp.ones((5, 1, 4, 4, 16))

    def looped(images):
        def body(total, image):
            return total + network.body(params, image, jnp.ones(1)).sum(), None

        return jax.lax.scan(body, jnp.float32(0), images)[0]

    assert made_by(jax.make_jaxpr(looped)(images).jaxpr, is_convolution) == 5
    # backwards: one for the images each
    assert made_by(jax.make_jaxpr(jax.grad(looped))(images).jaxpr, is_convolution) == 10


def test_passes_through_the_network_are_counted_forwards_and_backwards():
    network = with_named_body(mlp(2, (4,), (3,)))
    params = network.init(jax.random.key(0))["body"]

    def loss(params):
        return network.body(params, jnp.ones((5, 3)), jnp.ones(5)).sum()

    assert made_by(jax.make_jaxpr(loss)(params).jaxpr, is_pass) == 1
    assert made_by(jax.make_jaxpr(jax.grad(loss))(params).jaxpr, is_pass) == 2


def test_convolution_flops_closed_form():
    load = Workload(tasks=2, ways=3, shots=1, queries=1, image_shape=(4, 4, 1), width=8, depth=2)
    first, second = 2 * 16 * 9 * 1 * 8, 2 * 4 * 9 * 8 * 8
    assert load.convolution_flops == 12 * (2 * first + 3 * second)


def test_without_an_error_estimate_the_gradient_is_the_same(x64):
    example = quadratic_example()
    loop = mm.InnerLoop(mm.inner.gradient_descent(), steps=5)

    def run(estimate_error):
        estimator = implicit(estimate_error=estimate_error)
        given = (example.problem, loop, example.theta)
        of = mm.hypergradient.Chunk.of
        return jax.jit(lambda tasks: estimator(*given, of(tasks)))(example.tasks)

    full, lean = run(True), run(False)
    np.testing.assert_allclose(full.gradient, lean.gradient, rtol=1e-10)
    assert jnp.isfinite(full.report.error_estimate).all()
    assert lean.report.error_estimate is None


def test_the_ridge_problem_by_hand_takes_the_same_steps(x64):
    step, (init, by_hand) = ridges.meta_step(), ridges.by_hand()
    tasks, state = ridges.batch(), init(ridges.start())
    ours, by_hand = step.init(ridges.start()), jax.jit(by_hand)
    for _ in range(3):
        with jax.numpy_dtype_promotion("standard"):  # as optax needs it
            state, loss = by_hand(state, tasks)
        ours, metrics = step(ours, tasks)
        np.testing.assert_allclose(metrics.loss, loss, rtol=1e-9)
    np.testing.assert_allclose(ours.meta_params, state[0], rtol=1e-9)
    assert not jnp.allclose(state[0], ridges.start(), atol=1e-3)
