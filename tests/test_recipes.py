"""Algorithms by name on finite sums of quadratics, whose optimum is known in closed form."""

import dataclasses
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import memmeta as mm
from memmeta.inner import minibatch, step_by_step
from memmeta.meta import reset_every
from memmeta.recipes import amigo, bome, f2sa, ma_soba, saba, soba

ROWS, SIZE, INNER, OUTER, RIDGE, PULL = 8, 2, 3, 2, 0.5, 0.2


def data(seed=0):
    shapes = {"x": (INNER,), "z": (OUTER,), "y": (), "u": (INNER,), "w": ()}
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return {
        name: jax.random.normal(key, (ROWS, *shape))
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def inner_loss(phi, context):
    theta, rows = context
    left = rows["x"] @ phi - rows["y"] - rows["z"] @ theta
    return 0.5 * jnp.mean(left**2) + 0.5 * RIDGE * jnp.sum(phi**2)


def outer_loss(phi, context):
    theta, rows = context
    return 0.5 * jnp.mean((rows["u"] @ phi - rows["w"]) ** 2) + 0.5 * PULL * jnp.sum(theta**2), {}


PROBLEM = mm.Problem(
    embed=lambda theta, rows: (theta, rows),
    inner_loss=inner_loss,
    outer_loss=outer_loss,
    init=lambda theta: jnp.zeros(INNER, theta.dtype),
)
VIEW = minibatch(SIZE, of=lambda path: path.startswith("1/"))


def optimum(rows):
    """θ*: φ* = a + J θ, so that F is a quadratic of θ."""
    x, z, y, u, w = (rows[name] for name in "xzyuw")
    hessian = x.T @ x / ROWS + RIDGE * jnp.eye(INNER)
    a, jacobian = (jnp.linalg.solve(hessian, x.T @ right / ROWS) for right in (y, z))
    left = u @ jacobian
    curvature = left.T @ left / ROWS + PULL * jnp.eye(OUTER)
    return jnp.linalg.solve(curvature, left.T @ (w - u @ a) / ROWS)


def reached(step, tasks, count, key=0):
    """θ after so many meta-steps."""

    @jax.jit
    def run(state):
        return jax.lax.scan(lambda s, _: (step.update(s, tasks)[0], None), state, length=count)[0]

    return run(step.init(jnp.zeros(OUTER), tasks, jax.random.key(key))).meta.meta_params


def alone(rows):
    return jax.tree.map(lambda leaf: leaf[None], rows)


RATES = {"rate": 0.2, "linear_rate": 0.2}
EXACT = {
    "soba": partial(soba, **RATES),
    "ma_soba": partial(ma_soba, **RATES, average=0.3),
    "amigo": partial(amigo, **RATES, steps=2, linear_steps=2),
    "bome": partial(bome, rate=0.2, steps=10, outer_rate=0.1),
    "f2sa": partial(f2sa, rate=0.2, delta=1e-3, steps=3),
}


@pytest.mark.parametrize("name", [name for name in EXACT if name != "bome"])
def test_on_all_of_the_data_the_optimum_is_reached(name, x64):
    rows = data()
    step = EXACT[name](PROBLEM, optax.sgd(0.1))
    found = reached(step, alone(rows), 3000)
    np.testing.assert_allclose(found, optimum(rows), atol=1e-5 if name == "f2sa" else 1e-9)


def test_bome_comes_closer_with_smaller_rates_and_longer_trials(x64):
    rows, errors = data(), []
    for rate, steps, count in ((0.1, 10, 1000), (0.02, 50, 6000)):
        step = bome(PROBLEM, optax.sgd(rate), rate=0.2, steps=steps, outer_rate=rate)
        errors.append(jnp.linalg.norm(reached(step, alone(rows), count) - optimum(rows)))
    assert errors[1] < 0.3 * errors[0]


def test_the_bias_of_f2sa_is_of_order_p(x64):
    rows, errors = data(), {}
    for p in (1, 2):
        for delta in (0.04, 0.02):
            step = f2sa(PROBLEM, optax.sgd(0.1), rate=0.2, delta=delta, steps=3, p=p)
            errors[p, delta] = jnp.linalg.norm(reached(step, alone(rows), 3000) - optimum(rows))
    assert 1.8 < errors[1, 0.04] / errors[1, 0.02] < 2.2
    assert 3.6 < errors[2, 0.04] / errors[2, 0.02] < 4.4


@pytest.mark.parametrize("name", [name for name in EXACT if name != "bome"])
def test_on_draws_the_optimum_is_approached(name, x64):
    """A noise ball at fixed rates: near the optimum, in the mean over the last steps."""
    rows = data()
    options = {"f2sa": {"delta": 0.1}}.get(name, {"linear_rate": 0.05})
    slow = {"rate": 0.05}
    step = EXACT[name](PROBLEM, optax.sgd(0.01), view=VIEW, **options | slow)

    @jax.jit
    def run(state):
        def body(s, _):
            s = step.update(s, alone(rows))[0]
            return s, s.meta.meta_params

        return jax.lax.scan(body, state, length=6000)[1]

    found = run(step.init(jnp.zeros(OUTER), alone(rows)))
    exact = optimum(rows)
    assert jnp.linalg.norm(jnp.mean(found[3000:], axis=0) - exact) < 0.2 * jnp.linalg.norm(exact)


def test_stored_gradients_take_the_noise_away(x64):
    rows = data()
    batches = in_batches(rows)
    view = step_by_step(of=lambda path: path.startswith("1/"))
    rates = {"rate": 0.1, "linear_rate": 0.1}
    exact = saba(PROBLEM, optax.sgd(0.05), **rates, batches=ROWS // SIZE, view=view)
    noisy = soba(PROBLEM, optax.sgd(0.05), **rates, view=VIEW)
    np.testing.assert_allclose(reached(exact, batches, 4000), optimum(rows), atol=1e-9)
    assert jnp.linalg.norm(reached(noisy, alone(rows), 4000) - optimum(rows)) > 1e-3


def in_batches(rows):
    return jax.tree.map(lambda leaf: leaf.reshape(1, -1, SIZE, *leaf.shape[1:]), rows)


def with_table(batches=ROWS // SIZE, check_tasks=False, **options):
    view = step_by_step(of=lambda path: path.startswith("1/"))
    step = saba(PROBLEM, optax.sgd(0.05), **RATES, batches=batches, view=view)
    inside = dataclasses.replace(step.step, check_tasks=check_tasks)
    return dataclasses.replace(step, step=inside, **options)


def test_a_step_writes_one_row_of_the_table_in_place():
    """All of the state is where it was, and no step has more beside it for a longer table."""
    found = {}
    for batches in (4, 4000):
        rows = jax.tree.map(lambda leaf, n=batches: jnp.resize(leaf, (n, *leaf.shape)), data())
        step, tasks = with_table(batches), alone(rows)
        state = step.init(jnp.zeros(OUTER), tasks)
        sizes = step.compiled.lower(state, tasks).compile().memory_analysis()
        found[batches] = sizes.temp_size_in_bytes
        assert sizes.alias_size_in_bytes > step.memory_bytes(state) > 32 * batches
    assert found[4000] <= found[4] + 64


def test_a_new_life_begins_with_an_empty_table():
    tasks = in_batches(data())
    step = with_table(reset=reset_every(3))
    state = step.init(jnp.zeros(OUTER), tasks)
    for _ in range(2):
        state, _ = step(state, tasks)
    assert any(jnp.any(leaf != 0) for leaf in jax.tree.leaves(state.memory.table))
    state, _ = step(state, tasks)
    chex.assert_trees_all_equal(*zeros_like(state.memory.table))


def zeros_like(tree):
    return tree, jax.tree.map(jnp.zeros_like, tree)


def test_data_that_are_not_finite_leave_the_table_as_it_was():
    tasks = in_batches(data())
    broken = tasks | {"y": tasks["y"].at[:].set(jnp.nan)}
    step = with_table(check_tasks=True)
    state, _ = step(step.init(jnp.zeros(OUTER), tasks), tasks)
    before = jax.tree.map(np.array, state.memory)
    state, metrics = step(state, broken)
    assert metrics.counts.inputs == 1
    chex.assert_trees_all_equal(before, state.memory)


@pytest.mark.parametrize("on_host", [False, True])
def test_tables_of_some_members_are_those_of_all(on_host):
    tasks = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), *map(in_batches, map(data, (0, 1))))
    ends = []
    for numbers in (None, jnp.array([1, 0])):
        order = jnp.arange(2) if numbers is None else numbers
        step = with_table(size=2, on_host=on_host and numbers is not None)
        state = step.init(jnp.zeros(OUTER), tasks)
        for _ in range(3):
            some = jax.tree.map(lambda leaf, order=order: leaf[order], tasks)
            state, _ = step(state, some, numbers)
        ends.append((state.memory, state.meta.meta_params))
    chex.assert_trees_all_close(*ends, rtol=1e-5, atol=1e-6)


def test_many_steps_in_one_program_are_those_steps():
    tasks, count = alone(data()), 5
    step = soba(PROBLEM, optax.sgd(0.05), **RATES, view=VIEW)
    state = step.init(jnp.zeros(OUTER), tasks)
    ends, metrics = jax.lax.scan(lambda s, _: step(s, tasks), state, length=count)
    losses = []
    for _ in range(count):
        state, each = step(state, tasks)
        losses.append(each.loss)
    chex.assert_trees_all_close(ends.memory, state.memory, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(metrics.loss, jnp.stack(losses), rtol=1e-5)


def drawn(key, step, rows):
    """The rows of `minibatch`, by its definition."""
    epoch, batch = divmod(step, ROWS // SIZE)
    order = jax.random.permutation(jax.random.fold_in(key, epoch), ROWS)
    return jax.tree.map(lambda leaf: leaf[order[batch * SIZE : (batch + 1) * SIZE]], rows)


def product(phi, context, v):
    return jax.jvp(lambda p: jax.grad(inner_loss)(p, context), (phi,), (v,))[1]


def mixed(phi, context, v):
    by_theta = lambda p: jax.grad(lambda t: inner_loss(p, (t, context[1])))(context[0])  # noqa: E731
    return jax.jvp(by_theta, (phi,), (v,))[1]


def outer_slopes(phi, context):
    loss = lambda phi, theta: outer_loss(phi, (theta, context[1]))[0]  # noqa: E731
    return jax.grad(loss, argnums=(0, 1))(phi, context[0])


def test_soba_is_its_three_lines(x64):
    rows = data()
    step = soba(PROBLEM, optax.sgd(0.05), rate=0.1, linear_rate=0.2, view=VIEW)
    state = step.init(jnp.ones(OUTER), alone(rows))
    key = jax.random.wrap_key_data(state.memory.key)[0]
    phi, v, theta = jnp.zeros(INNER), jnp.zeros(INNER), jnp.ones(OUTER)
    for count in range(6):
        state, _ = step(state, alone(rows))
        context = (theta, drawn(key, count, rows))
        by_phi, by_theta = outer_slopes(phi, context)
        along = (
            jax.grad(inner_loss)(phi, context),
            product(phi, context, v) - by_phi,
            by_theta - mixed(phi, context, v),
        )
        phi, v, theta = phi - 0.1 * along[0], v - 0.2 * along[1], theta - 0.05 * along[2]
    found = (state.memory.params[0], state.memory.solution[0], state.meta.meta_params)
    chex.assert_trees_all_close(found, (phi, v, theta), rtol=1e-12)


def test_one_inner_and_one_linear_step_of_the_seam_are_soba_in_turn(x64):
    """`implicit` on draws: as SOBA, with each line at what the one before it has found."""
    rows = data()
    cold = mm.make_meta_step(
        PROBLEM,
        mm.InnerLoop(optax.sgd(0.1), 1, view=VIEW),
        mm.hypergradient.implicit(mm.linear_solve.neumann(1, rate=0.2), view=VIEW),
        optax.sgd(0.05),
    )
    step = mm.meta.WarmStart(cold, 1)
    state = step.init(jnp.ones(OUTER), alone(rows))
    key = jax.random.wrap_key_data(state.memory.key)[0]
    phi, v, theta = jnp.zeros(INNER), jnp.zeros(INNER), jnp.ones(OUTER)
    for count in range(6):
        state, _ = step(state, alone(rows))
        phi = phi - 0.1 * jax.grad(inner_loss)(phi, (theta, drawn(key, count, rows)))
        context = (theta, drawn(jax.random.fold_in(key, 2**31 - 4), count, rows))
        by_phi, by_theta = outer_slopes(phi, context)
        left = by_phi - product(phi, context, v)
        if jnp.linalg.norm(left) > jnp.linalg.norm(by_phi):  # `make_solver` begins at zero again
            v, left = jnp.zeros(INNER), by_phi
        v = v + 0.2 * left
        theta = theta - 0.05 * (by_theta - mixed(phi, context, v))
    found = (state.memory.params[0], state.memory.solution[0], state.meta.meta_params)
    chex.assert_trees_all_close(found, (phi, v, theta), rtol=1e-10)


def test_several_inner_problems_share_the_outer_one(x64):
    both = jax.tree.map(lambda a, b: jnp.stack([a, b]), data(0), data(1))
    step = soba(PROBLEM, optax.sgd(0.1), **RATES, size=2)

    def outer(theta):
        def one(rows):
            hessian = rows["x"].T @ rows["x"] / ROWS + RIDGE * jnp.eye(INNER)
            right = rows["x"].T @ (rows["y"] + rows["z"] @ theta) / ROWS
            return outer_loss(jnp.linalg.solve(hessian, right), (theta, rows))[0]

        return jnp.mean(jax.vmap(one)(both))

    slope = jax.grad(outer)(reached(step, both, 3000))
    np.testing.assert_allclose(slope, 0, atol=1e-9)


def flops(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]


def test_a_step_on_a_draw_costs_a_fiftieth_of_an_exact_hypergradient():
    """20,000 samples, batches of 64, against the Hessian products alone of twenty steps of CG."""
    count, features = 20_000, 50

    def g(phi, context):
        theta, rows = context
        fit = jnp.mean(jax.nn.softplus(-rows["labels"] * (rows["inputs"] @ phi)))
        return fit + 0.5 * jnp.sum(jnp.exp(theta) * phi**2)

    problem = mm.Problem(
        embed=lambda theta, rows: (theta, rows),
        inner_loss=g,
        outer_loss=lambda phi, c: (g(phi, (jnp.zeros(features), c[1])), {}),
        init=jnp.zeros_like,
    )
    rows = {"inputs": jnp.ones((1, count, features)), "labels": jnp.ones((1, count))}
    theta, first = jnp.zeros(features), jax.tree.map(lambda leaf: leaf[0], rows)
    hessian = lambda phi, v: mm.problem.hessian_product(problem, phi, (theta, first))[1](v)  # noqa: E731
    exact = 20 * flops(hessian, theta, theta)
    view = minibatch(64, of=lambda path: path.startswith("1/"))
    step = soba(problem, optax.sgd(0.1), rate=0.1, linear_rate=0.1, view=view)
    assert flops(step.update, step.init(theta, rows), rows) < exact / 50


def test_errors_say_what_to_do():
    with pytest.raises(ValueError, match="rate: expected"):
        soba(PROBLEM, optax.sgd(0.1), rate=0, linear_rate=0.1)
    with pytest.raises(ValueError, match="average: expected"):
        ma_soba(PROBLEM, optax.sgd(0.1), **RATES, average=1.5)
    with pytest.raises(ValueError, match="delta: expected a finite number above 0, found 0"):
        f2sa(PROBLEM, optax.sgd(0.1), rate=0.1, delta=0)


RECIPES = EXACT | {"saba": partial(saba, **RATES, batches=2)}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize(
    ("view", "message"),
    [
        (
            minibatch(ROWS + 1, of=lambda path: path.startswith("1/")),
            f"size: expected at most the {ROWS} rows there are, found {ROWS + 1}",
        ),
        (
            lambda c, key, step: (c[0], jax.tree.map(lambda leaf: leaf[: step + 1], c[1])),
            "view: found one whose shapes depend on the step.*dynamic_slice",
        ),
    ],
    ids=["too large", "of many shapes"],
)
def test_views_that_cannot_be_are_named(name, view, message):
    step = RECIPES[name](PROBLEM, optax.sgd(0.1), view=view)
    with pytest.raises(ValueError, match=message):
        step.init(jnp.zeros(OUTER), alone(data()))


@pytest.mark.parametrize("made", ["called", "in a scan"])
def test_a_state_of_another_population_is_named(made):
    tasks = jax.tree.map(lambda a, b: jnp.stack([a, b]), data(0), data(1))
    state = soba(PROBLEM, optax.sgd(0.1), **RATES, size=2).init(jnp.zeros(OUTER), tasks)
    step, one = soba(PROBLEM, optax.sgd(0.1), **RATES), alone(data())
    scanned = lambda: jax.lax.scan(lambda s, _: step.update(s, one), state, length=2)  # noqa: E731
    make = {"called": lambda: step(state, one), "in a scan": scanned}[made]
    with pytest.raises(
        ValueError, match=r"state: found the memory of 2 members, expected 1.*size=2"
    ):
        make()


@pytest.mark.parametrize("name", ["soba", "saba"])
def test_a_member_that_diverges_begins_anew_and_the_other_goes_on(name):
    tasks = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), *map(in_batches, map(data, (0, 1))))
    tasks["x"] = tasks["x"].at[1].mul(1e25)
    view = step_by_step(of=lambda path: path.startswith("1/"))
    options = {"saba": {"batches": ROWS // SIZE}}.get(name, {})
    step = {"soba": soba, "saba": saba}[name](
        PROBLEM, optax.sgd(0.05), **RATES, **options, view=view, size=2
    )
    state = step.init(jnp.zeros(OUTER), tasks)
    for count in (1, 2, 3, 4):
        state, metrics = step(state, tasks)
        # from φ = 0 the first step is finite, and the second one is not
        assert metrics.counts.reset == (count + 1) % 2
        assert metrics.used == 2 - metrics.counts.reset
        assert state.memory.steps.tolist() == [count, count % 2]
        chex.assert_tree_all_finite((state.memory, state.meta.meta_params))
