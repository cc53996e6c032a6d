"""Conformance of every estimator of the list: exact, honest, masked, chunked, odd leaves."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized
from assertions import relative_error
from jax.flatten_util import ravel_pytree
from problems import (
    EXAMPLES,
    exact_hypergradient,
    head_example,
    logistic_example,
    network_example,
    proximal_example,
    unrolled_hypergradient,
)

import memmeta as mm
from memmeta.hypergradient import ESTIMATORS

KEY, TASKS = 5, 4
STEPS = mm.InnerLoop(mm.inner.gradient_descent(), steps=5)
SOLVED = mm.InnerLoop(mm.inner.newton(None), steps=15)
FIXED = mm.InnerLoop(optax.sgd(0.1), steps=5)
"""For differences of losses, which see a measured rate move with θ."""


def inner_for(name):
    if ESTIMATORS[name].random:
        return FIXED
    return SOLVED if ESTIMATORS[name].aim == "solution" else STEPS


def call(estimator, example, inner):
    """(θ, tasks, weights, key) -> what an estimator says."""

    def function(theta, tasks, weights, key):
        chunk = mm.hypergradient.Chunk.of(tasks, weights, key)
        return estimator(example.problem, inner, theta, chunk)

    return function


@functools.cache
def compiled(name, problem):
    """One program of an estimator and a problem, for all tests; jit compiles it once per dtype."""
    return jax.jit(call(ESTIMATORS[name].make(), EXAMPLES[problem](TASKS), inner_for(name)))


def run(name, problem, example=None, weights=(1.0,) * TASKS, key=KEY):
    example = example or EXAMPLES[problem](TASKS)
    weights, key = jnp.asarray(weights, jnp.float32), jax.random.key(key)
    return compiled(name, problem)(example.theta, example.tasks, weights, key)


def run_once(estimator, example, inner):
    """The same for an estimator, a problem or a loop that no other test runs."""
    weights = jnp.ones(len(jax.tree.leaves(example.tasks)[0]), jnp.float32)
    arguments = (example.theta, example.tasks, weights, jax.random.key(KEY))
    return jax.jit(call(estimator, example, inner))(*arguments)


@functools.cache
def reference(problem, aim):
    """The exact answer, in float64 whatever the test's own precision."""
    with jax.enable_x64(True):
        example = EXAMPLES[problem](TASKS)
        if aim == "solution":
            exact = jax.jit(lambda t: exact_hypergradient(example._replace(theta=t)))
        else:
            exact = jax.jit(lambda t: unrolled_hypergradient(example._replace(theta=t), STEPS))
        return jax.tree.map(np.asarray, exact(example.theta))


def narrowed(problem):
    """The example of the float64 test, with its numbers rounded to float32."""
    with jax.enable_x64(True):
        example = EXAMPLES[problem](TASKS)
        narrow = {"f": np.float32, "i": np.int32}
        rounded = jax.tree.map(
            lambda x: np.asarray(x).astype(narrow[x.dtype.kind]), (example.theta, example.tasks)
        )
    return example._replace(theta=rounded[0], tasks=rounded[1])


EXACT = [name for name, entry in ESTIMATORS.items() if entry.aim != "own" and not entry.random]
RANDOM = [name for name, entry in ESTIMATORS.items() if entry.random]


def problem_for(name):
    """The smallest problem that the estimator accepts."""
    if ESTIMATORS[name].heads:
        return "head"
    return "network" if name == "reptile" else "quadratic"


def cases(names):
    return [(n, p) for n in names for p in (["head"] if ESTIMATORS[n].heads else EXAMPLES)]


@pytest.mark.parametrize(("name", "problem"), cases(EXACT))
def test_conformance_in_float64(name, problem, x64):
    entry, found = ESTIMATORS[name], run(name, problem)
    assert found.usable.all()
    assert relative_error(found.gradient, reference(problem, entry.aim)) < 1e-8
    check_report(found.report)
    estimated = found.report.error_estimate is not None
    if problem == "logistic" and estimated:  # μ is known, and the context is θ
        check_error_estimate(found, reference(problem, "solution"))


def hardest_first(name, problem):
    """In float32 one problem an estimator is checked in every run, the others by -m slow."""
    hardest = problem == ("head" if ESTIMATORS[name].heads else "network")
    return pytest.param(name, problem, marks=[] if hardest else pytest.mark.slow)


@pytest.mark.parametrize(("name", "problem"), [hardest_first(*case) for case in cases(EXACT)])
def test_conformance_in_float32(name, problem):
    found = run(name, problem, narrowed(problem))
    exact = jax.tree.map(np.float32, reference(problem, ESTIMATORS[name].aim))
    assert relative_error(found.gradient, exact) < (2e-4 if name == "perturbed" else 1e-4)


def check_report(report):
    assert not any(np.any(np.isnan(leaf)) for leaf in jax.tree.leaves(report))
    chex.assert_equal_shape(jax.tree.leaves(report))
    assert report.standard_error is None


def check_error_estimate(found, exact):
    """Of the true error's size: neither ten times too small nor a hundred times too large."""
    difference = jax.tree.map(jnp.subtract, found.gradient, exact)
    error, estimate = (
        float(optax.tree.norm(difference)),
        float(jnp.sum(found.report.error_estimate)),
    )
    assert error < 10 * estimate + 1e-9
    assert estimate < 100 * error + 1e-6


H = mm.hypergradient
JUDGED = {
    "implicit": H.implicit(),
    "implicit-1": H.implicit(mm.linear_solve.cg(1)),
    "unrolled": H.unrolled(),
    "truncated": H.truncated(2),
    "hessian_free": H.hessian_free(estimate_error=True),
    "first_order": H.first_order(estimate_error=True),
    "forward_mode": H.forward_mode(),
}


@pytest.mark.parametrize("name", JUDGED)
def test_error_estimates_follow_the_true_error(name, x64):
    """Where context and start are θ, μ is known and the loop stops early."""
    example = proximal_example(tasks=1)
    inner = mm.InnerLoop(mm.inner.gradient_descent(), steps=4)
    found = run_once(JUDGED[name], example, inner)
    check_error_estimate(found, proximal_solution())


@functools.cache
def proximal_solution():
    return jax.jit(lambda t: exact_hypergradient(proximal_example(1)._replace(theta=t)))(
        proximal_example(1).theta
    )


@pytest.mark.parametrize("aim", ["steps", "solution"])
def test_error_estimates_in_sample_space(aim, x64):
    """Where θ is the features themselves."""
    base = head_example(1)
    task = jax.tree.map(lambda x: x[0], base.tasks)
    context = base.problem.embed(base.theta, task)
    problem = dataclasses.replace(
        base.problem,
        embed=lambda theta, _: context._replace(
            support_features=theta["support"], query_features=theta["query"]
        ),
        init=lambda theta: {"kernel": jnp.zeros((5, 3)), "bias": jnp.zeros(3)},
    )
    theta = {"support": context.support_features, "query": context.query_features}
    example = base._replace(problem=problem, theta=theta)
    found = run_once(
        H.sample_space(aim), example, mm.InnerLoop(mm.inner.gradient_descent(), steps=15)
    )
    check_error_estimate(
        found, jax.jit(lambda t: exact_hypergradient(example._replace(theta=t)))(theta)
    )


def test_random_estimators_judge_the_loop_they_draw_from(x64):
    """As the exact one does, and not where they would need derivatives they do not take."""
    example, inner = proximal_example(1), mm.InnerLoop(mm.inner.gradient_descent(), steps=2)
    estimate = lambda made: run_once(made, example, inner).report.error_estimate  # noqa: E731
    exact = estimate(H.forward_mode())
    assert np.isfinite(exact)
    np.testing.assert_allclose(estimate(H.finite_difference(1, estimate_error=True)), exact)
    for unknown in (H.evolution_strategies(1), H.reptile()):
        assert estimate(unknown) is None


ALONE, DRAWS = (1.0, 0.0, 0.0, 0.0), 144


@functools.cache
def first_task_exactly(problem):
    example = EXAMPLES[problem](TASKS)
    first = example._replace(tasks=jax.tree.map(lambda x: x[:1], example.tasks))
    return ravel_pytree(run_once(H.forward_mode(), first, FIXED).gradient)[0]


@pytest.mark.parametrize(("name", "problem"), cases(RANDOM))
def test_random_estimators_are_unbiased(name, problem, x64):
    """Mean over keys within 4 standard errors of the exact gradient; the reported one is right."""
    example, exact = EXAMPLES[problem](TASKS), first_task_exactly(problem)
    found = [run(name, problem, example, weights=ALONE, key=key) for key in range(DRAWS)]
    gradients = np.stack([ravel_pytree(each.gradient)[0] for each in found])
    errors = np.array([each.report.standard_error[0] for each in found])
    spread = np.std(gradients, axis=0)
    bias = np.abs(np.mean(gradients, axis=0) - exact)
    assert np.all(bias < 4 * spread / DRAWS**0.5 + max(1e-9, ESTIMATORS[name].error))
    np.testing.assert_allclose(np.sqrt(np.mean(errors**2)), np.linalg.norm(spread), rtol=0.25)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_chunks_vmap_and_broken_tasks_change_nothing(name, x64):
    check_chunks_and_vmap(name)
    check_a_broken_task_is_left_out(name)


def check_chunks_and_vmap(name):
    """Two halves under a loop, for two θ under vmap, against one call for each θ."""
    problem = problem_for(name)
    example, whole = (
        EXAMPLES[problem](TASKS),
        call(ESTIMATORS[name].make(), EXAMPLES[problem](TASKS), inner_for(name)),
    )
    thetas = jax.tree.map(lambda x: jnp.stack([x, 1.1 * x]), example.theta)
    halves = jax.tree.map(lambda x: x.reshape(2, TASKS // 2, *x.shape[1:]), example.tasks)

    def in_halves(theta):
        one = lambda half: whole(theta, half, jnp.ones(2), jax.random.key(KEY))  # noqa: E731
        return jax.tree.map(
            lambda x: jnp.sum(x, axis=0), jax.lax.map(lambda h: one(h).gradient, halves)
        )

    found = jax.jit(jax.vmap(in_halves))(thetas)
    # differences of nearly equal numbers amplify rounding by 1/δ
    allowed = 1e-8 if ESTIMATORS[name].error else 1e-11
    for i in range(2):
        theta = jax.tree.map(lambda x, i=i: x[i], thetas)
        plain = run(name, problem, example._replace(theta=theta)).gradient
        assert relative_error(jax.tree.map(lambda x, i=i: x[i], found), plain) < allowed


def check_a_broken_task_is_left_out(name):
    """A task that overflows leaves the others' gradient as it was, and is marked."""
    problem = problem_for(name)
    example, mask = EXAMPLES[problem](TASKS), jnp.array([0, 2, 3])
    field = {"quadratic": "target", "network": "query_targets", "head": "query_inputs"}[problem]
    broken = getattr(example.tasks, field).at[1].set(jnp.nan if problem == "head" else 1e200)
    tasks = example.tasks._replace(**{field: broken})
    found = run(name, problem, example._replace(tasks=tasks))
    without = run(name, problem, weights=(1.0, 0.0, 1.0, 1.0))
    if name == "reptile":  # it does not look at the query set, but at the loss
        assert not np.isfinite(found.loss[1])
    assert found.usable.tolist() == [True, False, True, True]
    assert without.usable.tolist() == [True, False, True, True]
    if problem != "head":  # NaN inputs reach θ by 0 · NaN: see MetaStep, which blanks them
        assert relative_error(found.gradient, without.gradient) < 1e-10
    for leaf in jax.tree.leaves(found.report):
        assert not np.any(np.isnan(leaf[mask]))


class JitIsEager(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters("implicit", "unrolled", "forward_mode")
    def test_jit_is_eager(self, name):
        with jax.enable_x64(True):
            example, aim = EXAMPLES["quadratic"](TASKS), ESTIMATORS[name].aim
            run = self.variant(call(ESTIMATORS[name].make(), example, inner_for(name)))
            found = run(example.theta, example.tasks, jnp.ones(TASKS), jax.random.key(KEY))
            assert relative_error(found.gradient, reference("quadratic", aim)) < 1e-8


def test_hessian_free_has_the_error_of_central_differences(x64):
    """δ² by the third derivative; least at ε^(1/3), where it is of the size of ε^(2/3)."""
    example, exact = network_example(TASKS), reference("network", "steps")
    errors = [
        relative_error(run_once(H.hessian_free(scale), example, STEPS).gradient, exact)
        for scale in (2e-2, 1e-2, None)
    ]
    assert 3.5 < errors[0] / errors[1] < 4.5
    assert errors[2] < 100 * np.finfo(np.float64).eps ** (2 / 3)


SOLVERS = {
    "accelerated": mm.inner.accelerated(),
    "newton": mm.inner.newton(),
    "sgd": optax.sgd(0.1, momentum=0.9),
    "adam": optax.adam(0.05, eps_root=1e-8),
}


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_inner_solver_is_differentiated(solver, x64):
    """By mixed mode and forward: two ways to the same."""
    inner, example = mm.InnerLoop(SOLVERS[solver], steps=3), logistic_example(tasks=1)

    @jax.jit
    def all_ways(theta):
        names = ("forward_mode", "mixed_mode")
        arguments = (theta, example.tasks, jnp.ones(1), jax.random.key(KEY))
        return [call(ESTIMATORS[n].make(), example, inner)(*arguments).gradient for n in names]

    forward, mixed = all_ways(example.theta)
    assert relative_error(mixed, forward) < 1e-8


@pytest.mark.parametrize("solver", ["accelerated", "sgd"])
def test_sample_space_makes_the_steps_of_feature_space(solver, x64):
    """From a learned start of the head: loss, both gradients, and the norm at the end."""
    base, inner = head_example(), mm.InnerLoop(SOLVERS[solver], steps=4)
    problem = dataclasses.replace(
        base.problem,
        embed=lambda theta, batch: base.problem.embed(theta["features"], batch),
        init=lambda theta: theta["head"],
    )
    keys = jax.random.split(jax.random.key(0), 2)
    head = {"kernel": jax.random.normal(keys[0], (5, 3)), "bias": jax.random.normal(keys[1], (3,))}
    example = base._replace(problem=problem, theta={"features": base.theta, "head": head})
    found = run_once(H.sample_space(), example, inner)
    exact = run_once(H.unrolled(), example, inner)
    assert relative_error(found.gradient, exact.gradient) < 1e-10
    np.testing.assert_allclose(found.loss, exact.loss, rtol=1e-12)
    if solver == "sgd":  # the accelerated one steps from a point ahead
        lengths = found.report.inner_gradient_norm, exact.report.inner_gradient_norm
        np.testing.assert_allclose(*lengths, rtol=1e-8)


def test_own_estimators_are_what_they_say(x64):
    """first_order, reptile and truncated, each against its formula."""
    example = network_example(TASKS)
    problem = example.problem

    def first_order(theta, fixed, task):
        moved = jax.tree.map(lambda t, p: t + jax.lax.stop_gradient(p - t), theta, fixed)
        return problem.outer_loss(moved, (theta, task))[0]

    def reptile(theta, fixed, task):
        squares = jax.tree.map(lambda t, p: 0.5 * jnp.sum((t - p) ** 2), theta, fixed)
        return sum(jax.tree.leaves(squares))

    def truncated(theta, fixed, task):
        state = STEPS.start(problem, theta, (theta, task))
        state = jax.lax.stop_gradient(
            STEPS.advance(problem, state, (theta, task), jax.random.key(0), 2)
        )
        params = STEPS.advance(problem, state, (theta, task), jax.random.key(0), 3).params
        return problem.outer_loss(params, (theta, task))[0]

    @jax.jit
    def by_formula(theta):
        fixed = jax.vmap(lambda task: STEPS(problem, theta, (theta, task)))(example.tasks)

        def total(formula):
            each = jax.vmap(formula, (None, 0, 0))
            return jax.grad(lambda theta: jnp.sum(each(theta, fixed, example.tasks)))(theta)

        return [total(formula) for formula in (first_order, reptile, truncated)]

    names = ("first_order", "reptile", "truncated")
    for name, exact in zip(names, by_formula(example.theta), strict=True):
        assert relative_error(run(name, "network").gradient, exact) < 1e-12, name


def test_truncation_longer_than_the_loop_is_none(x64):
    whole = run_once(H.truncated(last=9), EXAMPLES["quadratic"](TASKS), STEPS)
    assert relative_error(whole.gradient, run("unrolled", "quadratic").gradient) < 1e-12


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Odd:
    """Meta-parameters with leaves that are not floating point, and one that is no array."""

    weight: jax.Array
    count: jax.Array
    key: jax.Array
    nothing: None = None


def odd_example():
    """g = ½‖φ − w b‖² + ½‖φ − w‖², f = n/2 ‖φ‖²: φ* = w (b + 1)/2, reached in one step at 1/L."""

    def embed(theta, batch):
        odd = theta["nested"]
        noise = jax.random.normal(odd.key, (3,), jnp.float32)
        weight = odd.weight.astype(jnp.float32)
        return {"weight": weight, "drive": weight * batch, "noise": noise, "n": odd.count}

    def inner_loss(phi, context):
        x = phi["x"].astype(jnp.float32)
        pull = 0.5 * jnp.sum((x - context["weight"]) ** 2)
        return 0.5 * jnp.sum((x - context["drive"] - 0 * context["noise"]) ** 2) + pull

    def outer_loss(phi, context):
        scale = context["n"].astype(jnp.float32)
        return scale * jnp.sum(phi["x"].astype(jnp.float32) ** 2) / 2, {"n": phi["n"]}

    def init(theta):
        return {"x": theta["nested"].weight, "n": theta["nested"].count}

    return mm.Problem(embed, inner_loss, outer_loss, init, smoothness=lambda c: jnp.float32(2.0))


def odd_head():
    """A linear head on features from bfloat16 weights."""

    def embed(theta, batch):
        odd = theta["nested"]
        noise = jax.random.normal(odd.key, (3,), jnp.float32)
        features = odd.weight * (batch + 0 * noise)[:, None].astype(jnp.bfloat16)
        labels = jnp.arange(3) % odd.count
        return mm.few_shot.HeadContext(features, labels, features, labels)

    def init(theta):
        return {"kernel": jnp.zeros((3, 2), jnp.bfloat16), "bias": jnp.zeros(2, jnp.bfloat16)}

    return mm.few_shot.softmax_problem(embed, init, 0.1)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_odd_leaves(name):
    """Integers and PRNG keys in θ, φ and contexts, nested custom pytrees, None, aux, bfloat16."""
    entry, values = ESTIMATORS[name], np.array([1.0, 2.0, 3.0])
    odd = Odd(jnp.asarray(values, jnp.bfloat16), jnp.int32(2), jax.random.key(0))
    tasks = jnp.asarray([[1.0, 1.0, 2.0], [1.0, 0.5, 3.0]])
    example = EXAMPLES["head"]()._replace(
        problem=odd_head() if entry.heads else odd_example(), theta={"nested": odd}, tasks=tasks
    )
    solver = mm.inner.newton(None) if entry.heads else mm.inner.gradient_descent()
    found = run_once(entry.make(), example, mm.InnerLoop(solver, steps=4))
    gradient = found.gradient["nested"]
    assert gradient.weight.dtype == jnp.bfloat16
    assert gradient.count is None
    assert gradient.key is None
    assert found.usable.all()
    assert found.loss.dtype == jnp.float32
    if not entry.heads:
        assert found.aux["n"].tolist() == [2, 2]
    found = gradient.weight.astype(np.float32)
    if entry.heads:
        np.testing.assert_allclose(found, odd_head_gradient(example), atol=2e-2)
        return
    half = (tasks + 1) / 2
    each = {"first_order": 2 * half, "reptile": 1 - half}.get(name, 2 * half**2)
    exact = values * np.sum(each, axis=0)
    if entry.random:  # mean_j (∇F·u_j) u_j: never at more than a right angle to ∇F
        assert found @ exact > 0
        return
    # differences of solutions in bfloat16 are as coarse as that
    np.testing.assert_allclose(found, exact, rtol=0.15 if name == "perturbed" else 3e-2)


def odd_head_gradient(example):
    """By an estimator that asks for no head."""
    inner = mm.InnerLoop(mm.inner.newton(None), steps=4)
    gradient = run_once(H.unrolled(), example, inner).gradient["nested"].weight
    return np.asarray(gradient, np.float32)


def test_odd_leaves_are_updated_in_their_dtype():
    odd = Odd(jnp.ones(3, jnp.bfloat16), jnp.int32(2), jax.random.key(0))
    step = mm.make_meta_step(odd_example(), mm.InnerLoop(steps=4), H.implicit(), optax.sgd(0.1))
    state, metrics = step(step.init({"nested": odd}), jnp.ones((2, 3)))
    assert state.meta_params["nested"].weight.dtype == jnp.bfloat16
    assert metrics.aux["n"] == 2


def test_the_bias_of_the_first_order_estimator_is_quadratic(x64):
    exact = reference("logistic", "solution")
    errors = [
        relative_error(
            run_once(H.perturbed(delta), EXAMPLES["logistic"](TASKS), SOLVED).gradient, exact
        )
        for delta in (1e-2, 1e-3)
    ]
    assert 90 < errors[0] / errors[1] < 110
