"""Nothing wrong goes unsaid: an error names its argument, or the metrics count it."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import memmeta as mm
from memmeta.few_shot.algorithms import METHODS
from memmeta.hypergradient import ESTIMATORS
from memmeta.linear_solve import cg

WAYS, INPUT = 3, (4,)
NAMED = re.compile(r"^[a-z_]+(\([^)]*\))?: ")


def good_tasks(tasks=2):
    keys = jax.random.split(jax.random.key(0), 2)
    labels = [jnp.tile(jnp.arange(n) % WAYS, (tasks, 1)) for n in (6, 9)]
    inputs = [jax.random.normal(k, (tasks, n, *INPUT)) for k, n in zip(keys, (6, 9), strict=True)]
    return mm.Task(inputs[0], labels[0], inputs[1], labels[1])


GOOD = good_tasks()


def changed(field, change):
    return GOOD._replace(**{field: change(getattr(GOOD, field))})


def one_hot(labels):
    return jax.nn.one_hot(labels, WAYS)


REFUSED = {
    f"{field}: {name}": changed(field, change)
    for field in ("support_targets", "query_targets")
    for name, change in {
        "labels from 1": lambda x: x + 1,
        "a label below padding": lambda x: x.at[0, 0].set(-5),
        "a label too large": lambda x: x.at[1, 2].set(WAYS + 4),
        "floats": lambda x: x.astype(jnp.float32),
        "one-hot floats": one_hot,
        "one-hot integers": lambda x: one_hot(x).astype(jnp.int32),
        "an axis of one": lambda x: x[..., None],
        "too few": lambda x: x[:, :-1],
        "bools": lambda x: x > 0,
    }.items()
} | {
    "a dict": GOOD._asdict(),
    "an array": GOOD.support_inputs,
    "no axis of tasks": jax.tree.map(lambda x: x[0], GOOD),
    "no task": jax.tree.map(lambda x: x[:0], GOOD),
}
"""Batches that are refused where the user calls in."""

COUNTED = {
    "support label 7": changed("support_targets", lambda x: x.at[0, 5].set(7)),
    "query label 7": changed("query_targets", lambda x: x.at[0, 0].set(7)),
    "no support": changed("support_targets", lambda x: x.at[0].set(-1)),
    "no query": changed("query_targets", lambda x: x.at[0].set(-1)),
    "a query of a class without support": changed(
        "support_targets", lambda x: jnp.where(x == 2, 1, x).at[1].set(x[1])
    ),
    "NaN in the support": changed("support_inputs", lambda x: x.at[0, 0, 0].set(jnp.nan)),
    "infinity in the query": changed("query_inputs", lambda x: x.at[0, 0, 0].set(jnp.inf)),
}
"""Batches whose first task is left out, and counted, inside compiled code; the second is good."""

NOTHING = {
    "labels from 1": GOOD._replace(
        support_targets=GOOD.support_targets + 1, query_targets=GOOD.query_targets + 1
    ),
    "all padding": GOOD._replace(query_targets=jnp.full_like(GOOD.query_targets, -1)),
    "all NaN": GOOD._replace(support_inputs=jnp.full_like(GOOD.support_inputs, jnp.nan)),
}
"""Batches of which no task is usable."""


@pytest.mark.parametrize("name", METHODS)
def test_bad_tasks_are_refused_or_counted(name):
    """For each method; the good task beside a bad one gives what it gives alone."""
    learner = METHODS[name](mm.models.mlp(WAYS, (8,), INPUT))
    step = learner.make_meta_step(optax.adam(1e-2), report="full")
    theta = learner.init(jax.random.key(1))
    for kind, tasks in REFUSED.items():
        with pytest.raises(ValueError, match=NAMED):
            step(step.init(theta), tasks)
        if kind not in ("no axis of tasks", "no task"):
            with pytest.raises(ValueError, match=NAMED):
                learner.evaluate(theta, tasks)
    update = jax.jit(step.update)
    _, sound = update(step.init(theta), GOOD)
    assert int(sound.used) == 2, mm.explain(sound)
    for kind, tasks in COUNTED.items():
        state, metrics = update(step.init(theta), tasks)
        assert int(metrics.counts.masked) == 1 == int(metrics.used), (kind, metrics.counts)
        causes = metrics.counts.inputs, metrics.counts.inner_loop, metrics.counts.outer_loss
        assert sum(map(int, causes)) + int(metrics.counts.hypergradient) == 1
        np.testing.assert_allclose(metrics.loss, sound.tasks.loss[1], rtol=1e-4)
        np.testing.assert_allclose(metrics.aux["accuracy"], sound.tasks.aux["accuracy"][1])
        assert "1 of 2 tasks left out" in mm.explain(metrics), kind
        assert finite(state.meta_params)
    for kind, tasks in NOTHING.items():
        state, metrics = update(step.init(theta), tasks)
        check_that_nothing_was_learned(kind, step, theta, state, metrics)


def check_that_nothing_was_learned(kind, step, theta, state, metrics):
    assert int(metrics.used) == 0, kind
    averages = (metrics.loss, metrics.aux, metrics.gradient_norm, metrics.report.inner_steps)
    assert all(np.isnan(leaf) for leaf in jax.tree.leaves(averages)), kind
    errors = (metrics.report.error_estimate, metrics.report.error_bound)
    assert all(np.isinf(leaf) for leaf in jax.tree.leaves(errors)), kind
    assert "no task was usable" in mm.explain(metrics)
    jax.tree.map(np.testing.assert_array_equal, state.meta_params, step.init(theta).meta_params)


def finite(tree):
    return all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(tree))


def test_an_evaluation_says_which_tasks_count():
    learner = METHODS["protonet"](mm.models.mlp(WAYS, (8,), INPUT))
    found = jax.jit(learner.evaluate)(learner.init(jax.random.key(0)), COUNTED["no query"])
    assert found.usable.tolist() == [False, True]
    assert np.isnan(found.loss[0])
    assert np.isnan(found.aux["accuracy"][0])


# Problems of the user's own, under every estimator.

BASE = mm.Problem(
    embed=lambda theta, batch: (theta["shift"] + batch, theta["ridge"]),
    inner_loss=lambda phi, c: (
        jnp.sum(jnp.log(jnp.cosh(phi - c[0]))) + 0.5 * jnp.exp(c[1]) * jnp.sum(phi**2)
    ),
    outer_loss=lambda phi, c: (jnp.sum((phi - c[0]) ** 2), {}),
    init=lambda theta: 0.1 * theta["shift"],
)
THETA = {"shift": jnp.array([0.3, -0.2]), "ridge": jnp.float32(-1.0)}
BATCH = jnp.array([[1.0, 2.0], [0.5, -1.0]])
HEADS_ONLY = [name for name, entry in ESTIMATORS.items() if entry.heads]
ANY = [name for name in ESTIMATORS if name not in HEADS_ONLY]

WRONG = {
    "inner loss a vector": ({"inner_loss": lambda phi, c: phi - c[0]}, "inner_loss"),
    "inner loss with an aux": ({"inner_loss": lambda phi, c: (jnp.sum(phi), {})}, "inner_loss"),
    "inner loss an integer": ({"inner_loss": lambda phi, c: jnp.int32(1)}, "inner_loss"),
    "outer loss without an aux": ({"outer_loss": lambda phi, c: jnp.sum(phi)}, "outer_loss"),
    "outer loss a vector": ({"outer_loss": lambda phi, c: (phi, {})}, "outer_loss"),
    "outer loss of three": ({"outer_loss": lambda phi, c: (jnp.sum(phi), {}, 1)}, "outer_loss"),
    "integer φ": ({"init": lambda theta: jnp.zeros(2, jnp.int32)}, "init"),
    "an embedding that fails": ({"embed": lambda theta, batch: theta["none"]}, "embed"),
    "shapes that do not fit": (
        {"inner_loss": lambda phi, c: jnp.sum(phi @ jnp.ones((3, 3)))},
        "inner_loss",
    ),
}


@pytest.mark.parametrize("name", ANY)
def test_wrong_problems_are_named(name):
    for change, function in WRONG.values():
        problem = dataclasses.replace(BASE, **change)
        step = make_step(problem, ESTIMATORS[name].make())
        with pytest.raises(ValueError, match=rf"^{function}: "):
            step(step.init(THETA), BATCH)


def make_step(problem, estimator, optimizer=optax.sgd(0.1), inner=None, **options):
    inner = mm.InnerLoop(optax.sgd(0.2), steps=3) if inner is None else inner
    return mm.make_meta_step(problem, inner, estimator, optimizer, **options)


@pytest.mark.parametrize("name", ANY)
def test_a_meta_parameter_that_nothing_uses_is_named(name):
    estimator = ESTIMATORS[name].make()
    problem = BASE
    if ESTIMATORS[name].aim == "solution":  # these see no start
        problem = dataclasses.replace(BASE, init=lambda theta: jnp.zeros(2))
    step = make_step(problem, estimator)
    theta = THETA | {"rate": jnp.float32(0.1)}
    with pytest.raises(
        ValueError, match=r"hypergradient of .*\['rate'\].* is zero by construction"
    ):
        step(step.init(theta), BATCH)


@pytest.mark.parametrize("name", ANY)
def test_bad_numbers_are_counted(name):
    """Inputs, the inner loop, an outer rate: θ stays finite, and the reason is told."""
    problem = BASE
    if name in ("first_order", "reptile"):  # these do not see the ridge
        problem = dataclasses.replace(BASE, embed=lambda t, batch: (t["shift"] + batch, 0.0))
    estimator, theta = ESTIMATORS[name].make(), dict(THETA)
    if name in ("first_order", "reptile"):
        theta.pop("ridge")
    if ESTIMATORS[name].aim == "solution":
        problem = dataclasses.replace(problem, init=lambda theta: jnp.zeros(2))
    step = make_step(problem, estimator)
    update = jax.jit(step.update)
    for batch in (BATCH.at[0, 0].set(jnp.nan), BATCH.at[0, 1].set(jnp.inf)):
        state, metrics = update(step.init(theta), batch)
        assert int(metrics.counts.inputs) == 1 == int(metrics.used)
        assert finite(state.meta_params)
    _, metrics = update(step.init(theta), jnp.full_like(BATCH, jnp.nan))
    assert int(metrics.used) == 0
    assert np.isnan(metrics.loss)
    immense = make_step(problem, estimator, optax.sgd(jnp.inf))
    state, metrics = jax.jit(immense.update)(immense.init(theta), BATCH)
    assert int(metrics.counts.refused) == 1, mm.explain(metrics)
    assert finite(state.meta_params)


@pytest.mark.parametrize(
    ("optimizer", "dtype"),
    [
        (optax.sgd(1e30), jnp.float32),
        (optax.sgd(1e30), jnp.bfloat16),
        (optax.adam(jnp.nan), jnp.float32),
        (optax.adam(0.1), jnp.float32),
        (optax.adam(0.1), jnp.float16),
    ],
)
def test_what_is_not_finite_is_never_stored(optimizer, dtype):
    """float16 under Adam, an infinite rate, and one immense batch among good ones."""
    problem = mm.Problem(
        embed=lambda theta, batch: (theta, batch),
        inner_loss=lambda phi, c: jnp.sum((phi - c[0]) ** 2),
        outer_loss=lambda phi, c: (jnp.sum((phi.astype(jnp.float32) - c[1]) ** 2), {}),
        init=jnp.zeros_like,
    )
    step = make_step(problem, mm.hypergradient.unrolled(), optimizer)
    state, update = step.init(jnp.ones(2, dtype)), jax.jit(step.update)
    for scale in (1.0, 1e18, 1.0, 1.0):
        state, _ = update(state, jnp.asarray(scale * BATCH, jnp.float32))
        stored = (state.meta_params, state.optimizer)
        assert finite([x for x in jax.tree.leaves(stored) if jnp.issubdtype(x.dtype, jnp.floating)])


def test_without_a_guard_every_update_is_followed():
    step = make_step(BASE, mm.hypergradient.unrolled(), optax.sgd(jnp.inf), guard=None)
    state, metrics = step(step.init(THETA), BATCH)
    assert not finite(state.meta_params)
    assert int(metrics.counts.refused) == 0


def test_the_factor_of_the_guard_is_a_setting():
    for factor, refused in ((2.0, 1), (1e9, 0)):
        step = make_step(BASE, mm.hypergradient.unrolled(), guard=mm.meta.guard(factor))
        state, update = step.init(THETA), jax.jit(step.update)
        state, _ = update(state, BATCH)
        _, metrics = update(state, 30 * BATCH)
        assert int(metrics.counts.refused) == refused
    with pytest.raises(ValueError, match=r"factor: expected a number above 1, found 0\.5"):
        mm.meta.guard(0.5)


def test_strict_raises_with_the_sentence():
    step = make_step(BASE, mm.hypergradient.unrolled(), strict=True)
    state = step.init(THETA)
    state, metrics = step(state, BATCH)
    assert mm.explain(metrics) == "All 2 tasks went well."
    with pytest.raises(FloatingPointError, match="1 of 2 tasks left out: 1 whose data are not"):
        step(state, BATCH.at[0, 0].set(jnp.nan))
    step(state, BATCH)  # the state is still there


# Optimisers inside.

STEPPED = ("unrolled", "unrolled-sqrt", "mixed_mode", "hessian_free", "truncated", "forward_mode")
CLIP = "clip_by_global_norm"  # has a forward derivative at zero, and none in reverse
NO_DERIVATIVE_AT_ZERO = {
    "adam": optax.adam(0.1),
    CLIP: optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)),
}


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [(n, o) for n in STEPPED for o in NO_DERIVATIVE_AT_ZERO if (n, o) != ("forward_mode", CLIP)],
)
def test_an_optimiser_without_a_derivative_at_zero_is_refused(name, optimizer):
    inner = mm.InnerLoop(NO_DERIVATIVE_AT_ZERO[optimizer], steps=2)
    step = make_step(BASE, ESTIMATORS[name].make(), inner=inner)
    with pytest.raises(ValueError, match=r"^solver: .*eps_root=1e-8"):
        step(step.init(THETA), BATCH)


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.sgd(0.1),
        optax.sgd(0.1, momentum=0.9),
        optax.adam(0.1, eps_root=1e-8),
        optax.lbfgs(),
        optax.MultiSteps(optax.sgd(0.1), 2),
        optax.chain(optax.clip(1.0), optax.sgd(0.1)),
    ],
)
def test_any_optimiser_makes_steps_inside_and_outside(optimizer):
    problem = dataclasses.replace(BASE, init=lambda theta: jnp.zeros(2))
    step = make_step(problem, mm.hypergradient.implicit(), inner=mm.InnerLoop(optimizer, steps=20))
    _, metrics = step(step.init(THETA), BATCH)
    assert float(metrics.report.inner_reduction) < 1.0
    outside = make_step(problem, mm.hypergradient.implicit(), optimizer, mm.InnerLoop(steps=20))
    state = outside.init(THETA)
    losses = []
    for _ in range(12):
        state, metrics = outside(state, BATCH)
        losses.append(float(metrics.loss))
    assert losses[-1] < 0.98 * losses[0]
    assert int(metrics.counts.refused) == 0


def test_an_optimiser_of_two_sets_of_parameters_is_refused():
    lookahead = optax.lookahead(optax.sgd(0.1), 3, 0.5)
    with pytest.raises(ValueError, match="solver: expected an optimiser of one set"):
        mm.InnerLoop(lookahead, steps=2)
    with pytest.raises(ValueError, match="optimizer: expected an optimiser of one set"):
        make_step(BASE, mm.hypergradient.unrolled(), lookahead)


# Where an implicit rule does not hold.


def quadratic(curvature):
    return mm.Problem(
        embed=lambda theta, batch: theta + batch,
        inner_loss=lambda phi, c: 0.5 * jnp.sum(curvature * (phi - c) ** 2),
        outer_loss=lambda phi, c: (jnp.sum(phi**2), {}),
        init=lambda theta: jnp.zeros(2),
    )


def projected():
    """Gradient steps into the box [-1, 1], which holds one coordinate at the solution."""

    def update(problem, params, state, context, step, key):
        slope = jax.grad(problem.inner_loss)(params, context)
        norm = jax.lax.stop_gradient(jnp.linalg.norm(slope))
        return jnp.clip(params - 0.5 * slope, -1.0, 1.0), state, norm

    return mm.inner.InnerSolver(lambda problem, params, context: (), update)


@pytest.mark.parametrize(
    ("solver", "left"),
    [
        (optax.chain(optax.add_decayed_weights(0.5), optax.sgd(0.3)), 2),
        (projected(), 2),
        (optax.sgd(1e-4), 2),
        (optax.sgd(0.3), 0),
    ],
)
def test_loops_that_end_at_no_minimiser_are_counted(solver, left):
    inner = mm.InnerLoop(solver, steps=60)
    step = make_step(quadratic(jnp.ones(2)), mm.hypergradient.implicit(), inner=inner)
    _, metrics = step(step.init(jnp.array([0.2, 3.0])), 0.1 * BATCH)
    assert int(metrics.counts.unconverged) == left
    assert ("minimiser" in mm.explain(metrics)) == bool(left)
    solution = mm.implicit_solution(quadratic(jnp.ones(2)).inner_loss, inner, with_report=True)
    _, report = solution(jnp.zeros(2), jnp.array([0.2, 3.0]))
    assert (float(report.inner_reduction) > 0.1) == bool(left)


@pytest.mark.parametrize(
    ("estimator", "inner", "said"),
    [
        (
            mm.hypergradient.implicit(cg(5, preconditioner=lambda system: (jnp.negative, 0))),
            mm.InnerLoop(steps=20),
            "Preconditioner not positive",
        ),
        (
            mm.hypergradient.fixed_point(cg(5)),  # with momentum I − ∂T is not symmetric
            mm.InnerLoop(optax.sgd(0.1, momentum=0.5), steps=20),
            "Asymmetric product",
        ),
        (mm.hypergradient.implicit(cg(5)), mm.InnerLoop(steps=20), ""),
    ],
    ids=["preconditioner", "asymmetric", "sound"],
)
def test_what_a_linear_solver_says_reaches_the_report(estimator, inner, said):
    step = make_step(quadratic(jnp.array([1.0, 2.0])), estimator, inner=inner)
    _, metrics = step(step.init(jnp.ones(2)), jnp.ones((3, 2)))
    assert int(metrics.used) == 3
    assert int(metrics.counts.unsound) == (3 if said else 0), mm.explain(metrics)
    assert said in mm.explain(metrics)
    assert metrics.report.linear_status is None
    assert metrics.tasks.report.linear_status.shape == (3,)


@pytest.mark.parametrize("name", ["implicit", "implicit-minres", "unrolled", "first_order"])
def test_a_loss_with_a_rule_of_its_own_for_reverse_mode(name, x64):
    """`jax.custom_vjp` has no forward derivative: products are taken in reverse twice."""

    @jax.custom_vjp
    def square(x):
        return jnp.sum(x**2)

    square.defvjp(lambda x: (square(x), x), lambda x, bar: (2 * bar * x,))

    def with_square(square):
        problem = quadratic(jnp.array([1.0, 3.0]))
        inner_loss = lambda phi, c: 0.5 * square(phi - c)  # noqa: E731
        outer_loss = lambda phi, c: (square(phi) + jnp.sum(c), {})  # noqa: E731
        return dataclasses.replace(problem, inner_loss=inner_loss, outer_loss=outer_loss)

    found = []
    for rule in (square, lambda x: jnp.sum(x**2)):
        step = make_step(with_square(rule), ESTIMATORS[name].make())
        batch = BATCH.astype(jnp.float64)
        found.append(step.gradient(step.init(jnp.array([0.2, 3.0])), batch)[0])
    np.testing.assert_allclose(*found, rtol=1e-12)


def test_a_line_search_cannot_be_unrolled():
    step = make_step(BASE, mm.hypergradient.unrolled(), inner=mm.InnerLoop(optax.lbfgs(), steps=2))
    with pytest.raises(ValueError, match=r"^solver: .*line search"):
        step(step.init(THETA), BATCH)


def test_forward_mode_says_what_it_needs():
    square = jax.custom_vjp(lambda x: jnp.sum(x**2))
    square.defvjp(lambda x: (square(x), x), lambda x, bar: (2 * bar * x,))
    loss = lambda phi, c: square(phi - c)  # noqa: E731
    problem = dataclasses.replace(quadratic(jnp.ones(2)), inner_loss=loss)
    step = make_step(problem, mm.hypergradient.forward_mode())
    with pytest.raises(ValueError, match=r"^forward_mode: .*custom_vjp.*unrolled\(\)"):
        step(step.init(jnp.ones(2)), BATCH)


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -1.0, True, "much"])
def test_numbers_that_are_none_are_refused(value):
    for make, name in (
        (lambda: mm.linear_solve.cg(damping=value), "damping"),
        (lambda: mm.few_shot.softmax_problem(lambda t, b: b, lambda t: t, value), "ridge"),
        (lambda: mm.InnerLoop(tolerance=value), "tolerance"),
        (lambda: mm.hypergradient.hessian_free(value), "scale"),
    ):
        with pytest.raises(Exception, match=name):
            make()
    for make, name in (
        (lambda: mm.InnerLoop(steps=value), "steps"),
        (lambda: mm.linear_solve.cg(value), "steps"),
        (lambda: mm.hypergradient.truncated(value), "last"),
        (lambda: mm.models.mlp(value, (4,), INPUT), "ways|outputs"),
    ):
        with pytest.raises(Exception, match=name):
            make()


def test_a_factory_that_was_not_called_is_named():
    for name in ("implicit", "unrolled", "forward_mode", "first_order", "reptile"):
        with pytest.raises(ValueError, match=rf"estimator: .*{name}\(\)"):
            make_step(BASE, getattr(mm.hypergradient, name))


def test_a_solver_of_other_arguments_is_named():
    old = mm.inner.InnerSolver(lambda problem, params, context: (), lambda g, params, state, c: 0)
    with pytest.raises(ValueError, match=r"solver\.update: expected a function of 6 arguments"):
        mm.InnerLoop(old)


def test_leaves_that_are_no_arrays_are_named():
    step = make_step(BASE, mm.hypergradient.unrolled())
    with pytest.raises(ValueError, match=r"meta_params: found .* at \['act'\], expected arrays"):
        step.init(THETA | {"act": jax.nn.relu})
    with pytest.raises(ValueError, match=r"^tasks: "):
        step(step.init(THETA), {"x": BATCH, "name": "first"})


def test_the_number_of_bad_inputs_tried():
    """The count of the lists above: methods × batches, estimators × problems and numbers."""
    methods = len(METHODS) * (len(REFUSED) + len(COUNTED) + len(NOTHING))
    estimators = len(ANY) * (len(WRONG) + 5)
    assert methods + estimators > 600
