"""Inner solvers: they converge, cannot diverge, stop where told, and take any dtype."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import EXAMPLES, logistic_example, network_example, quadratic_example

import memmeta as mm

SAFE = {
    "gradient_descent": mm.inner.gradient_descent(),
    "accelerated": mm.inner.accelerated(),
    "newton": mm.inner.newton(),
    "newton-dense": mm.inner.newton(None),
}


def final(example, inner, scale=1.0):
    """The loop of the first task, its features scaled, at its end."""
    task = jax.tree.map(lambda x: x[0], example.tasks)
    if scale != 1.0:
        task = task._replace(support_inputs=scale * task.support_inputs)
    context = example.problem.embed(example.theta, task)
    start = example.problem.init(example.theta)

    @jax.jit
    def run(start, context):
        state = inner.run(example.problem, start, context, jax.random.key(0))
        loss = functools.partial(example.problem.inner_loss, context=context)
        gradient = mm.trees.norm(jax.grad(loss)(state.params))
        return state, loss(start), loss(state.params), gradient

    return run(start, context)


@pytest.mark.parametrize("name", SAFE)
@pytest.mark.parametrize("problem", EXAMPLES)
def test_converges(problem, name, x64):
    steps = 12 if name.startswith("newton") else 400
    _, _, _, gradient = final(EXAMPLES[problem](), mm.InnerLoop(SAFE[name], steps=steps))
    assert gradient < 1e-8


@pytest.mark.parametrize("name", SAFE)
@pytest.mark.parametrize("scale", [1e-4, 1e3, 1e6])
def test_cannot_diverge(name, scale):
    """Whatever the scale of the features: the loss never ends above where it started."""
    example = network_example() if scale < 1e4 else logistic_example()
    state, before, after, _ = final(example, mm.InnerLoop(SAFE[name], steps=30), scale)
    assert np.isfinite(after)
    assert after <= before * (1 + 1e-5)
    assert state.steps == 30


def test_a_fixed_rate_does_diverge():
    """The reason why the default is another one."""
    inner = mm.InnerLoop(optax.sgd(0.5), steps=30)
    _, before, after, _ = final(quadratic_example(), inner)
    assert not after < before


def test_the_rate_is_no_part_of_the_derivative(x64):
    """smoothness(context) may depend on θ: the steps are differentiated at a fixed rate."""
    problem = mm.Problem(
        embed=lambda theta, batch: theta,
        inner_loss=lambda phi, c: 0.5 * jnp.sum((phi - c) ** 2),
        outer_loss=lambda phi, c: (jnp.sum(phi), {}),
        init=lambda theta: jnp.zeros(2),
        smoothness=lambda c: 2.0 + jnp.sum(c**2),
    )
    inner = mm.InnerLoop(mm.inner.gradient_descent(), steps=1)

    def total(theta):
        state = inner.advance(
            problem, inner.start(problem, jnp.zeros(2), theta), theta, jax.random.key(0), 1
        )
        return jnp.sum(state.params)

    theta = jnp.array([1.0, 2.0])
    np.testing.assert_allclose(jax.jit(jax.grad(total))(theta), np.full(2, 1 / 7), rtol=1e-12)


@pytest.mark.parametrize("name", ["accelerated", "newton"])
def test_tolerance_stops_early(name, x64):
    inner = mm.InnerLoop(SAFE[name], steps=500, tolerance=1e-5)
    state, _, _, gradient = final(logistic_example(), inner)
    assert 1 < state.steps < 500
    assert gradient <= 1e-5
    assert state.gradient_norm <= 1e-5


def test_tolerance_under_vmap_stops_each_task_alone(x64):
    example = logistic_example()
    inner = mm.InnerLoop(mm.inner.accelerated(), steps=500, tolerance=1e-5)
    contexts = jax.vmap(lambda task: example.problem.embed(example.theta, task))(example.tasks)

    @jax.jit
    def run(contexts):
        one = lambda c: inner.run(example.problem, jnp.zeros(4), c, jax.random.key(0))  # noqa: E731
        return jax.vmap(one)(contexts), jax.lax.map(one, contexts)

    together, apart = run(contexts)
    np.testing.assert_array_equal(together.steps, apart.steps)
    np.testing.assert_allclose(together.params, apart.params, rtol=1e-12)
    assert len(set(together.steps.tolist())) > 1


@pytest.mark.parametrize("name", ["unrolled", "unrolled-sqrt", "mixed_mode", "truncated"])
def test_reverse_mode_refuses_a_tolerance(name):
    example = logistic_example()
    inner = mm.InnerLoop(steps=5, tolerance=1e-3)
    estimator = mm.hypergradient.ESTIMATORS[name].make()
    with pytest.raises(ValueError, match="tolerance: expected None where steps are different"):
        jax.eval_shape(
            lambda theta: (
                estimator(
                    example.problem, inner, theta, mm.hypergradient.Chunk.of(example.tasks)
                ).gradient
            ),
            example.theta,
        )


@pytest.mark.parametrize("name", ["implicit", "forward_mode", "first_order"])
def test_others_report_the_steps_made(name, x64):
    example = logistic_example()
    inner = mm.InnerLoop(steps=500, tolerance=1e-4)
    estimator = mm.hypergradient.ESTIMATORS[name].make()
    if name == "first_order":  # it would see nothing of a ridge
        example = network_example()
    found = jax.jit(
        lambda theta: estimator(
            example.problem, inner, theta, mm.hypergradient.Chunk.of(example.tasks)
        )
    )(example.theta)
    assert np.all((found.report.inner_steps > 1) & (found.report.inner_steps < 500))


def test_bfloat16_parameters_move_by_small_steps():
    """Steps too small for bfloat16 add up, because the iterates are kept in float32."""

    def loss(phi, context):
        return 0.5 * jnp.sum((phi.astype(jnp.float32) - context) ** 2)

    problem = mm.Problem(lambda t, b: b, loss, lambda p, c: (loss(p, c), {}), lambda t: t)
    inner = mm.InnerLoop(optax.sgd(1e-4), steps=5000)
    found = jax.jit(lambda: inner(problem, jnp.full(2, 100, jnp.bfloat16), jnp.full(2, 101.0)))()
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(np.float32), 100.5, atol=0.3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": -1}, "steps: expected a whole number"),
        ({"tolerance": 0.0}, "tolerance: expected a finite number above 0"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        mm.InnerLoop(**options)


def test_no_step_is_the_start():
    example = quadratic_example()
    inner = mm.InnerLoop(steps=0)
    context = example.problem.embed(example.theta, jax.tree.map(lambda x: x[0], example.tasks))
    found = inner(example.problem, jnp.arange(6.0), context)
    np.testing.assert_array_equal(found, np.arange(6.0))
