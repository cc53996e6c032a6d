"""One conformance test over the list of all estimators; memory, randomness, masks, odd leaves."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import (
    EXAMPLES,
    exact_hypergradient,
    head_example,
    logistic_example,
    network_example,
    quadratic_example,
    quadratic_problem,
    quadratic_tasks,
    unrolled_hypergradient,
)

import memmeta as mm
from memmeta.hypergradient import ESTIMATORS

KEY = 5
STEPS = mm.InnerLoop(mm.gradient_descent(), steps=5)
SOLVED = mm.InnerLoop(mm.inner.newton(None), steps=15)


# compiling is most of what these tests do, and small arrays need no optimised code
quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def run(estimator, example, inner, key=None):
    count = jax.tree.leaves(example.tasks)[0].shape[0]
    key = jax.random.key(KEY) if key is None else key
    return estimator(
        example.problem, inner, example.theta, example.tasks, jnp.ones(count, jnp.float32), key
    )


def jitted(estimator, example, inner, key=None):
    """Compiled as users run it: θ, tasks and key are arguments."""

    def call(theta, tasks, key):
        return run(estimator, example._replace(theta=theta, tasks=tasks), inner, key)

    key = jax.random.key(KEY) if key is None else key
    return quick(call)(example.theta, example.tasks, key)


def relative_error(found, exact):
    difference = jax.tree.map(jnp.subtract, found, exact)
    return float(mm.trees.norm(difference) / mm.trees.norm(exact))


@functools.cache
def reference(name, aim):
    """The exact answer, in float64 whatever the test's own precision."""
    with jax.enable_x64(True):
        example = EXAMPLES[name]()
        if aim == "solution":
            exact = quick(lambda t: exact_hypergradient(example._replace(theta=t)))
        else:
            exact = quick(lambda t: unrolled_hypergradient(example._replace(theta=t), STEPS))
        return jax.tree.map(np.asarray, exact(example.theta))


def narrowed(name):
    """The example of the float64 test, with its numbers rounded to float32."""
    with jax.enable_x64(True):
        example = EXAMPLES[name]()
        narrow = {"f": np.float32, "i": np.int32}
        rounded = jax.tree.map(
            lambda x: np.asarray(x).astype(narrow[x.dtype.kind]), (example.theta, example.tasks)
        )
    return example._replace(theta=rounded[0], tasks=rounded[1])


EXACT = {n: e for n, e in ESTIMATORS.items() if e.aim != "own" and not e.random}
RANDOM = {n: e for n, e in ESTIMATORS.items() if e.random}


def problems_for(entry):
    return ["head"] if entry.heads else list(EXAMPLES)


CASES = [(n, p) for n, entry in EXACT.items() for p in problems_for(entry)]


@pytest.mark.parametrize(("name", "problem"), CASES)
def test_conformance_in_float64(name, problem, x64):
    entry = EXACT[name]
    inner = SOLVED if entry.aim == "solution" else STEPS
    found = jitted(entry.make(), EXAMPLES[problem](), inner)
    assert found.usable.all()
    error = relative_error(found.gradient, reference(problem, entry.aim))
    assert error < max(1e-8, entry.error)
    check_report(found.report)


@pytest.mark.parametrize("name", EXACT)
def test_conformance_in_float32(name):
    entry = EXACT[name]
    problem = "head" if entry.heads else "quadratic"
    inner = SOLVED if entry.aim == "solution" else STEPS
    found = jitted(entry.make(), narrowed(problem), inner)
    exact = jax.tree.map(np.float32, reference(problem, entry.aim))
    assert relative_error(found.gradient, exact) < max(1e-4, 300 * entry.error)


def check_report(report):
    for leaf in report:
        assert not np.any(np.isnan(leaf))
        assert leaf.shape == report.inner_steps.shape
    assert np.all(report.standard_error == 0)


@pytest.mark.parametrize("name", RANDOM)
def test_random_estimators_are_unbiased(name, x64):
    """Mean over keys within 4 standard errors of the exact gradient; the reported one is right."""
    entry, example = RANDOM[name], quadratic_example(tasks=1)
    exact = quick(lambda t: unrolled_hypergradient(example._replace(theta=t), STEPS))(example.theta)
    keys = jax.random.split(jax.random.key(KEY), 256)
    found = quick(jax.vmap(lambda key: run(entry.make(), example, STEPS, key)))(keys)
    spread = np.std(found.gradient, axis=0)
    mean = np.mean(found.gradient, axis=0)
    assert np.all(np.abs(mean - exact) < 4 * spread / 16 + 1e-6)
    measured = np.sqrt(np.sum(spread**2))
    reported = np.sqrt(np.mean(found.report.standard_error**2))
    np.testing.assert_allclose(reported, measured, rtol=0.2)


@pytest.mark.parametrize("name", RANDOM)
def test_random_estimators_agree_with_the_exact_derivative_along_their_directions(name, x64):
    """With as many directions as it takes, on the head, the answer is the exact gradient's."""
    make = {
        "forward_mode-random": lambda: mm.hypergradient.forward_mode(400),
        "finite_difference": lambda: mm.hypergradient.finite_difference(400),
        "evolution_strategies": lambda: mm.hypergradient.evolution_strategies(400),
    }[name]
    found = jitted(make(), head_example(), STEPS)
    exact = reference("head", "steps")
    allowed = 1.5 * float(jnp.sum(found.report.standard_error)) / float(mm.trees.norm(exact))
    assert relative_error(found.gradient, exact) < allowed


def example_for(name):
    """The smallest problem that the estimator accepts."""
    if ESTIMATORS[name].heads:
        return head_example(4)
    return network_example(4) if name == "reptile" else quadratic_example(4)


BY_THE_SEAM = ("implicit", "first_order", "forward_mode", "finite_difference", "sample_space-steps")
"""One estimator for each way of treating a chunk of tasks."""


@pytest.mark.parametrize("name", [*BY_THE_SEAM, "forward_mode-random", "evolution_strategies"])
def test_chunks_and_vmap_change_nothing(name, x64):
    example, estimator = example_for(name), ESTIMATORS[name].make()
    thetas = jax.tree.map(lambda x: jnp.stack([x, 1.1 * x]), example.theta)

    @quick
    def three_ways(thetas, tasks):
        def whole(theta, tasks):
            return run(estimator, example._replace(theta=theta, tasks=tasks), STEPS).gradient

        theta = jax.tree.map(lambda x: x[0], thetas)
        halves = jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), tasks)
        parts = jax.lax.map(lambda half: whole(theta, half), halves)
        batched = jax.vmap(whole, (0, None))(thetas, tasks)
        summed = jax.tree.map(lambda x: jnp.sum(x, axis=0), parts)
        return whole(theta, tasks), summed, jax.tree.map(lambda x: x[0], batched)

    plain, chunked, batched = three_ways(thetas, example.tasks)
    assert relative_error(chunked, plain) < 1e-12
    # differences of nearly equal numbers amplify rounding by 1/scale
    assert relative_error(batched, plain) < (1e-8 if ESTIMATORS[name].error else 1e-12)


def test_jit_changes_nothing(x64):
    eager = run(mm.hypergradient.unrolled(), quadratic_example(), STEPS)
    compiled = jitted(mm.hypergradient.unrolled(), quadratic_example(), STEPS)
    assert relative_error(eager.gradient, compiled.gradient) < 1e-12


SOLVERS = {
    "accelerated": mm.accelerated(),
    "gradient_descent": mm.gradient_descent(),
    "newton": mm.inner.newton(),
    "sgd": optax.sgd(0.1, momentum=0.9),
    "adam": optax.adam(0.05),
}


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_inner_solver_is_differentiated(solver, x64):
    """By reverse mode with checkpoints, by mixed mode, and forward, the same."""
    inner = mm.InnerLoop(SOLVERS[solver], steps=3)
    example = logistic_example(tasks=1)

    @quick
    def all_ways(theta):
        moved = example._replace(theta=theta)
        names = ("mixed_mode", "unrolled-recursive", "forward_mode")
        found = [run(ESTIMATORS[name].make(), moved, inner).gradient for name in names]
        return unrolled_hypergradient(moved, inner), found

    exact, found = all_ways(example.theta)
    for gradient in found:
        assert relative_error(gradient, exact) < 1e-8


@pytest.mark.parametrize("solver", ["accelerated", "sgd"])
def test_sample_space_makes_the_steps_of_feature_space(solver, x64):
    inner = mm.InnerLoop(SOLVERS[solver], steps=4)
    example = head_example()
    found = jitted(mm.hypergradient.sample_space(), example, inner)
    exact = quick(lambda t: unrolled_hypergradient(example._replace(theta=t), inner))(example.theta)
    assert relative_error(found.gradient, exact) < 1e-10
    plain = jitted(mm.hypergradient.unrolled(), example, inner)
    np.testing.assert_allclose(found.loss, plain.loss, rtol=1e-12)


def test_sample_space_starts_where_the_head_starts(x64):
    """A learned start of the head: its gradient too, and the norm of the gradient at the end."""
    example = head_example()
    base = example.problem
    problem = dataclasses.replace(
        base,
        embed=lambda theta, batch: base.embed(theta["features"], batch),
        init=lambda theta: theta["head"],
    )
    keys = jax.random.split(jax.random.key(0), 2)
    head = {"kernel": jax.random.normal(keys[0], (5, 3)), "bias": jax.random.normal(keys[1], (3,))}
    example = example._replace(problem=problem, theta={"features": example.theta, "head": head})
    found = jitted(mm.hypergradient.sample_space(), example, STEPS)
    exact = quick(lambda t: unrolled_hypergradient(example._replace(theta=t), STEPS))(example.theta)
    assert relative_error(found.gradient, exact) < 1e-10
    task = jax.tree.map(lambda x: x[0], example.tasks)
    context = problem.embed(example.theta, task)
    params = STEPS(problem, head, context)
    length = mm.trees.norm(jax.grad(problem.inner_loss)(params, context))
    np.testing.assert_allclose(found.report.inner_gradient_norm[0], length, rtol=1e-8)


def test_own_estimators_are_what_they_say(x64):
    """first_order, reptile and truncated, each against its formula."""
    example = network_example()
    problem = example.problem

    def by_formula(formula):
        def total(theta):
            return jnp.sum(jax.vmap(lambda task: formula(theta, task))(example.tasks))

        return quick(jax.grad(total))(example.theta)

    def final(theta, task):
        return jax.lax.stop_gradient(STEPS(problem, theta, (theta, task)))

    def first_order(theta, task):
        moved = jax.tree.map(
            lambda t, p: t + jax.lax.stop_gradient(p - t), theta, final(theta, task)
        )
        return problem.outer_loss(moved, (theta, task))[0]

    def reptile(theta, task):
        squares = jax.tree.map(lambda t, p: 0.5 * jnp.sum((t - p) ** 2), theta, final(theta, task))
        return sum(jax.tree.leaves(squares))

    def truncated(theta, task):
        early = dataclasses.replace(STEPS, steps=2)
        state = early.start(problem, theta, (theta, task))
        fixed = jax.lax.stop_gradient(early.advance(problem, state, (theta, task), 2))
        params = STEPS.advance(problem, fixed, (theta, task), 3).params
        return problem.outer_loss(params, (theta, task))[0]

    for name, formula in (
        ("first_order", first_order),
        ("reptile", reptile),
        ("truncated", truncated),
    ):
        found = jitted(ESTIMATORS[name].make(), example, STEPS)
        assert relative_error(found.gradient, by_formula(formula)) < 1e-12, name
    whole = jitted(mm.hypergradient.truncated(last=9), example, STEPS)
    plain = jitted(mm.hypergradient.unrolled(), example, STEPS)
    assert relative_error(whole.gradient, plain.gradient) < 1e-12


def test_error_estimate_follows_the_true_error(x64):
    """Where the context is θ: the estimate is of the true error's size, however early the stop."""
    example = network_example(tasks=1, proximal=2.0)
    exact = quick(lambda t: exact_hypergradient(example._replace(theta=t)))(example.theta)
    for steps, cg_steps in ((3, 20), (30, 1)):
        estimator = mm.hypergradient.implicit(mm.linear_solve.cg(cg_steps))
        found = jitted(estimator, example, mm.InnerLoop(mm.gradient_descent(), steps=steps))
        error = relative_error(found.gradient, exact) * float(mm.trees.norm(exact))
        estimate = float(found.report.error_estimate[0])
        assert error < 10 * estimate + 1e-9
        assert estimate < 100 * error + 1e-6


@pytest.mark.parametrize("name", BY_THE_SEAM)
def test_a_broken_task_is_left_out(name, x64):
    """A task whose losses overflow leaves the others' gradient as it was, and is marked."""
    entry, example = ESTIMATORS[name], head_example(3)
    problem = example.problem

    def overflow(params, context):
        loss, aux = problem.outer_loss(params, context)
        return jnp.where(context.query_targets[0] < 0, jnp.inf, loss), aux

    broken = example.tasks._replace(query_targets=example.tasks.query_targets.at[1, 0].set(-1))
    example = example._replace(problem=dataclasses.replace(problem, outer_loss=overflow))
    if name.startswith("sample_space"):  # its outer loss is that of the head
        example = example._replace(problem=problem)
        broken = example.tasks._replace(
            support_inputs=example.tasks.support_inputs.at[1].set(jnp.nan)
        )
    kept = jax.tree.map(lambda x: x[jnp.array([0, 2])], example.tasks)

    @quick
    def both(theta, broken, kept):
        return tuple(
            run(entry.make(), example._replace(theta=theta, tasks=tasks), STEPS)
            for tasks in (broken, kept)
        )

    found, exact = both(example.theta, broken, kept)
    assert found.usable.tolist() == [True, False, True]
    if not name.startswith("sample_space"):  # NaN features reach θ by 0 · NaN: see MetaStep
        assert relative_error(found.gradient, exact.gradient) < 1e-10
    for leaf in found.report:
        assert np.all(np.isfinite(leaf[jnp.array([0, 2])]) | np.isinf(leaf[jnp.array([0, 2])]))


def bytes_used(estimator, example, steps):
    """Temporary memory of the compiled estimator."""
    inner = mm.InnerLoop(optax.sgd(0.1), steps=steps)

    def call(theta, tasks):
        found = run(estimator, example._replace(theta=theta, tasks=tasks), inner)
        return found.gradient, found.report

    compiled = quick(call).lower(example.theta, example.tasks).compile()
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
    estimator, example = mm.hypergradient.implicit(), large_example("implicit", 64)
    used = {bytes_used(estimator, example, steps) for steps in (1, 10, 100, 1000)}
    assert len(used) == 1


def test_sample_space_keeps_no_state_of_the_size_of_the_features():
    """What grows with the features is the Gram matrices and their pull-back, once."""
    samples, ways = 6 + 7, 3

    def wide(features):
        def init(theta):
            return {"kernel": jnp.zeros((features, ways)), "bias": jnp.zeros(ways)}

        example = head_example(1)
        problem = dataclasses.replace(example.problem, init=init)
        return example._replace(problem=problem, theta={"body": jnp.ones((4, features))})

    estimator = mm.hypergradient.sample_space()
    growth = bytes_used(estimator, wide(1064), 50) - bytes_used(estimator, wide(64), 50)
    assert growth < 4 * 1000 * (4 * samples + 4 * ways)


@pytest.mark.parametrize("name", ["implicit", "unrolled", "mixed_mode", "forward_mode-random"])
def test_odd_leaves(name):
    """Integers and PRNG keys in θ, φ and contexts, a custom pytree, None, aux, bfloat16."""

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Odd:
        weight: jax.Array
        count: jax.Array
        key: jax.Array
        nothing: None = None

    def embed(theta, batch):
        noise = jax.random.normal(theta.key, (3,), jnp.float32)
        return {"drive": theta.weight.astype(jnp.float32) * batch, "noise": noise, "n": theta.count}

    def inner_loss(phi, context):
        drive = context["drive"] + 0.0 * context["noise"]
        return 0.5 * jnp.sum((phi["x"].astype(jnp.float32) - drive) ** 2)

    def outer_loss(phi, context):
        scale = context["n"].astype(jnp.float32)
        return scale * jnp.sum(phi["x"].astype(jnp.float32) ** 2) / 2, {"n": phi["n"]}

    problem = mm.Problem(
        embed,
        inner_loss,
        outer_loss,
        lambda theta: {"x": jnp.zeros(3, jnp.bfloat16), "n": theta.count},
    )
    theta = Odd(jnp.asarray([1.0, 2.0, 3.0], jnp.bfloat16), jnp.int32(2), jax.random.key(0))
    inner = mm.InnerLoop(mm.gradient_descent(), steps=4)
    step = mm.make_meta_step(problem, inner, ESTIMATORS[name].make(), optax.sgd(0.1))
    tasks = jnp.asarray([[1.0, 1.0, 2.0], [1.0, 0.5, 1.0]])
    gradient, metrics = quick(step.gradient)(step.init(theta), tasks)
    exact = 2 * np.mean(np.square(tasks), axis=0) * np.array([1.0, 2.0, 3.0])
    if not ESTIMATORS[name].random:
        np.testing.assert_allclose(gradient.weight.astype(np.float32), exact, rtol=3e-2)
    assert gradient.count is None
    assert metrics.aux["n"] == 2
    state, _ = step(step.init(theta), tasks)
    assert state.meta_params.weight.dtype == jnp.bfloat16
