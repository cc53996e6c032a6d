"""One conformance test over the list of inner solvers and some of optax, and what the loop does."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized
from assertions import refused, relative_error
from problems import EXAMPLES, head_example, logistic_example, network_example, quadratic_example

import memmeta as mm
from memmeta.hypergradient import ESTIMATORS

SAFE = {name: make() for name, make in mm.inner.SOLVERS.items()} | {
    "newton-dense": mm.inner.newton(None)
}
"""They need no rate, and cannot diverge."""
OPTIMIZERS = {
    "sgd": optax.sgd(0.4),
    "momentum": optax.sgd(0.2, momentum=0.5),
    "adam": optax.adam(0.3, b1=0.5, eps=1.0),  # so that its rate goes to that of gradient descent
}
SOLVERS = SAFE | OPTIMIZERS
STEPS, KEY = 400, 0


def odd_task(seed=0):
    """The context of g = ½ xᵀA x − bᵀx, x = (φ.a, φ.b): with an integer leaf and a PRNG key."""
    keys = jax.random.split(jax.random.key(seed), 2)
    basis = jnp.linalg.qr(jax.random.normal(keys[0], (4, 4)))[0]
    matrix = (basis * jnp.linspace(1.0, 3.0, 4)) @ basis.T
    sides = jax.random.normal(keys[1], (2, 4))
    return {"matrix": matrix, "sides": sides, "which": jnp.int32(1), "key": jax.random.key(seed)}


def odd_start(dtype):
    """φ₀ with an integer leaf and none at all."""
    return {"a": jnp.ones(1, dtype), "nested": (jnp.ones(3, dtype), jnp.int32(7)), "none": None}


def joined(params):
    return jnp.concatenate([params["a"], params["nested"][0]])


def inner_loss(params, context):
    x = joined(params).astype(context["matrix"].dtype)
    assert params["nested"][1].dtype == jnp.int32
    return 0.5 * x @ context["matrix"] @ x - context["sides"][context["which"]] @ x


ODD = mm.Problem(
    embed=lambda theta, batch: batch,
    inner_loss=inner_loss,
    outer_loss=lambda params, context: (inner_loss(params, context), {}),
    init=lambda theta: odd_start(jnp.float32),
)


def solve(name, start, context):
    return mm.InnerLoop(SOLVERS[name], steps=STEPS)(ODD, start, context)


@functools.cache
def compiled(name):
    """One program a solver and dtype for all tests."""
    return jax.jit(functools.partial(solve, name))


def exact(context):
    return np.linalg.solve(context["matrix"], context["sides"][1])


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(jnp.float64, 1e-7), (jnp.float32, 1e-5), (jnp.bfloat16, 1e-2)]
)
@pytest.mark.parametrize("name", SOLVERS)
def test_conformance(name, dtype, tolerance):
    """The minimum of a quadratic in odd parameters, in their dtype; what is no float is kept."""
    with jax.enable_x64(dtype == jnp.float64):
        context = odd_task()
        found = compiled(name)(odd_start(dtype), context)
        assert joined(found).dtype == dtype
        assert found["nested"][1] == 7
        assert found["none"] is None
        x = np.asarray(joined(found), context["matrix"].dtype)
        np.testing.assert_allclose(x, exact(context), atol=tolerance)


@pytest.mark.parametrize("name", SOLVERS)
def test_vmap_is_a_loop(name, x64):
    start = odd_start(jnp.float64)
    each = [odd_task(seed) for seed in range(3)]
    together = jax.tree.map(lambda *x: jnp.stack(x), *each)
    found = jax.jit(jax.vmap(functools.partial(solve, name), (None, 0)))(start, together)
    apart = [compiled(name)(start, context) for context in each]
    chex.assert_trees_all_close(found, jax.tree.map(lambda *x: jnp.stack(x), *apart), atol=1e-10)


class JitIsEager(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(*SOLVERS)
    def test_jit_is_eager(self, name):
        """A few steps with and without `jax.jit`, against the steps written as a Python loop."""
        solver, context = mm.InnerLoop(SOLVERS[name]).solver, odd_task()
        start = jnp.zeros(4)
        problem = dataclasses.replace(
            ODD, inner_loss=lambda x, c: 0.5 * x @ c["matrix"] @ x - c["sides"][1] @ x
        )
        run = self.variant(lambda x, c: mm.InnerLoop(solver, steps=3)(problem, x, c))
        state, expected = solver.init(problem, start, context), start
        for step in range(3):
            expected, state, _ = solver.update(
                problem, expected, state, context, jnp.int32(step), jax.random.key(KEY)
            )
        chex.assert_trees_all_close(run(start, context), expected, atol=1e-5)


@pytest.mark.parametrize("name", SOLVERS)
def test_at_the_minimum_it_stays(name, x64):
    """A zero gradient moves nothing, and is nothing to divide by."""
    context = odd_task() | {"sides": jnp.zeros((2, 4))}
    start = jax.tree.map(lambda x: jnp.zeros_like(x), odd_start(jnp.float64))
    found = compiled(name)(start, context)
    chex.assert_trees_all_close(joined(found), jnp.zeros(4))


@pytest.mark.parametrize("name", SAFE)
def test_a_task_of_nan_stays_where_it_is_or_says_so(name, x64):
    """No loop of steps ends in a finite place that nobody asked for."""
    context = odd_task() | {"matrix": jnp.full((4, 4), jnp.nan)}
    found = joined(compiled(name)(odd_start(jnp.float64), context))
    assert np.all(np.isnan(found)) or np.all(found == 1)


K, TASKS = 4, 3
"""Steps, each on a mini-batch of its own, and tasks."""


def batches():
    """A mini-batch of every task for each inner step, and a query set."""
    keys = jax.random.split(jax.random.key(0), 4)
    draw = lambda key, *shape: jax.random.normal(key, (TASKS, *shape))  # noqa: E731
    return {
        "support": {"x": draw(keys[0], K, 5, 2), "y": draw(keys[1], K, 5)},
        "query": {"x": draw(keys[2], 6, 2), "y": draw(keys[3], 6)},
        "number": jnp.arange(TASKS),
    }


def error(params, batch):
    return jnp.mean((jnp.tanh(batch["x"] @ params["in"]) @ params["out"] - batch["y"]) ** 2)


def stochastic_problem():
    """A small network; θ is where it starts and the centre of a proximal term, and not the data."""

    def proximal(params, context):
        gaps = jax.tree.map(lambda p, t: jnp.sum((p - t) ** 2), params, context["theta"])
        return 0.5 * sum(jax.tree.leaves(gaps))

    return mm.Problem(
        embed=lambda theta, batch: batch | {"theta": theta},
        inner_loss=lambda p, c: error(p, c["support"]) + proximal(p, c),
        outer_loss=lambda p, c: (error(p, c["query"]), {}),
        init=lambda theta: theta,
    )


THETA = {"in": 0.5 + 0.1 * jnp.arange(6.0).reshape(2, 3), "out": jnp.ones(3)}


def perturbed_step(problem, params, context, step, key):
    """A step on this step's mini-batch, with a perturbation of this step's and task's own."""
    support = jax.tree.map(lambda x: x[step], context["support"])
    slope = jax.grad(problem.inner_loss)(params, context | {"support": support})
    draw = 1 + 0.1 * jax.random.normal(jax.random.fold_in(key, step), ())
    return jax.tree.map(lambda p, g: p - 0.1 * draw * g, params, slope), optax.tree.norm(slope)


def perturbed_sgd():
    """An inner solver that slices whatever leaves its data have: missing ones it would not miss."""

    def init(problem, params, context):
        chex.assert_tree_no_nones(context)
        return ()

    def update(problem, params, state, context, step, key):
        chex.assert_tree_no_nones(context)
        params, norm = perturbed_step(problem, params, context, step, key)
        return params, state, norm

    return mm.inner.InnerSolver(init, update)


@functools.cache
def by_hand():
    """The losses of all tasks, and the gradient of their sum, through a Python loop."""
    problem = stochastic_problem()

    def losses(theta):
        def one_task(batch):
            context, params = problem.embed(theta, batch), theta
            key = jax.random.fold_in(jax.random.key(KEY), batch["number"])
            for step in range(K):
                params, _ = perturbed_step(problem, params, context, step, key)
            return problem.outer_loss(params, context)[0]

        each = jax.vmap(one_task)(batches())
        return jnp.sum(each), each

    gradient, each = jax.jit(jax.grad(losses, has_aux=True))(THETA)
    return each, gradient


WITHOUT_HEAD = [name for name, entry in ESTIMATORS.items() if not entry.heads]
"""Of the others `sample_space` runs the solver on a problem of its own, in place of the task's."""


@pytest.mark.parametrize("name", WITHOUT_HEAD)
def test_a_solver_sees_the_whole_context_its_step_and_its_key(name):
    """Leaves that θ does not reach too: the losses are those of the loop written by hand."""
    problem, entry = stochastic_problem(), ESTIMATORS[name]
    inner, make = mm.InnerLoop(perturbed_sgd(), steps=K), entry.make

    @jax.jit
    def run(theta, tasks):
        chunk = mm.hypergradient.Chunk.of(tasks, key=jax.random.key(KEY))
        return make()(problem, inner, theta, chunk)

    found, (losses, gradient) = run(THETA, batches()), by_hand()
    np.testing.assert_allclose(found.loss, losses, rtol=1e-4)
    if entry.aim == "steps" and not entry.random:
        assert relative_error(found.gradient, gradient) < 1e-3


def test_a_solver_sees_the_whole_context_of_a_head():
    """The features, which θ reaches, and the targets, which it does not."""
    example, seen = head_example(1), []

    def update(problem, params, state, context, step, key):
        seen.append(jax.eval_shape(lambda: context))
        return params, state, jnp.float32(0)

    inner = mm.InnerLoop(mm.inner.InnerSolver(lambda problem, params, context: (), update), steps=2)
    estimator = ESTIMATORS["implicit-woodbury"].make()
    chunk = mm.hypergradient.Chunk.of(example.tasks)
    jax.eval_shape(lambda theta: estimator(example.problem, inner, theta, chunk), example.theta)
    task = jax.tree.map(lambda x: x[0], example.tasks)
    context = jax.eval_shape(example.problem.embed, example.theta, task)
    assert seen
    for found in seen:
        chex.assert_trees_all_equal_shapes_and_dtypes(found, context)


def test_a_solver_sees_the_same_in_evaluation():
    problem, inner = stochastic_problem(), mm.InnerLoop(perturbed_sgd(), steps=K)
    judge = jax.jit(lambda theta, tasks: mm.evaluate(problem, inner, theta, tasks))
    losses = by_hand()[0]
    np.testing.assert_allclose(judge(THETA, batches()).loss, losses, rtol=1e-5)


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
        gradient = optax.tree.norm(jax.grad(loss)(state.params))
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


def test_a_fixed_rate_does_diverge(x64):
    """The reason why the default is another one: ∇g_K = (I − ηA)ᴷ ∇g₀, here with ‖I − ηA‖ = 4."""
    example, rate, steps = quadratic_example(), 0.5, 10
    _, _, _, gradient = final(example, mm.InnerLoop(optax.sgd(rate), steps=steps))
    matrix, coupling = example.tasks.hessian[0], example.tasks.coupling[0]
    power = np.linalg.matrix_power(np.eye(6) - rate * matrix, steps)
    expected = np.linalg.norm(power @ coupling @ example.theta)
    np.testing.assert_allclose(gradient, expected, rtol=1e-9)
    assert expected > 1e5


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
        ({"steps": -1}, "expected a whole number, 0 or more, below 2³¹, found -1"),
        ({"steps": 2**31}, "expected a whole number, 0 or more, below 2³¹, found 2147483648"),
        ({"steps": 2.5}, "expected a whole number, 0 or more, below 2³¹, found 2.5"),
        ({"tolerance": 0.0}, "expected a finite number above 0, found 0.0"),
        ({"tolerance": float("nan")}, "expected a finite number above 0, found nan"),
    ],
)
def test_bad_options_are_named(options, message):
    with refused(*options, message):
        mm.InnerLoop(**options)


def test_no_step_is_the_start():
    example = quadratic_example()
    inner = mm.InnerLoop(steps=0)
    context = example.problem.embed(example.theta, jax.tree.map(lambda x: x[0], example.tasks))
    found = inner(example.problem, jnp.arange(6.0), context)
    np.testing.assert_array_equal(found, np.arange(6.0))
