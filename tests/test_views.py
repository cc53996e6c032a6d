"""What an inner step sees: the loop as it is run, by hand, differentiated and evaluated."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import memmeta as mm
from memmeta.hypergradient import ESTIMATORS
from memmeta.inner import minibatch, step_by_step

ROWS, SIZE, STEPS, RATE = 6, 2, 5, 0.3
KEYS = jax.random.split(jax.random.key(0), 4)
THETA = {"in": 0.5 + 0.1 * jnp.arange(8.0).reshape(2, 4), "out": jnp.linspace(0.5, 1.0, 4)}
DIFFERENTIATE_STEPS = [
    name
    for name, entry in ESTIMATORS.items()
    if entry.aim == "steps" and not entry.heads and not entry.random
]


def is_data(path):
    return path in ("1/inputs", "1/targets")


def tasks(*axes):
    """Two tasks with support rows behind these axes, and a query."""
    return {
        "inputs": jax.random.normal(KEYS[0], (2, *axes, 2)),
        "targets": jax.random.normal(KEYS[1], (2, *axes)),
        "query_inputs": jax.random.normal(KEYS[2], (2, 7, 2)),
        "query_targets": jax.random.normal(KEYS[3], (2, 7)),
    }


def loss(phi, inputs, targets):
    return jnp.mean((jnp.tanh(inputs @ phi["in"]) @ phi["out"] - targets) ** 2)


PROBLEM = mm.Problem(
    embed=lambda theta, task: (theta, task),
    inner_loss=lambda phi, c: loss(phi, c[1]["inputs"], c[1]["targets"]),
    outer_loss=lambda phi, c: (loss(phi, c[1]["query_inputs"], c[1]["query_targets"]), {}),
    init=lambda theta: theta,
)


def by_hand(theta, batch, rows_of):
    """The mean outer loss after a loop written out; rows_of(task's number, step, leaf) -> rows."""

    def one(number):
        task = jax.tree.map(lambda leaf: leaf[number], batch)
        phi = theta
        for step in range(STEPS):
            rows = [rows_of(number, step, task[name]) for name in ("inputs", "targets")]
            slope = jax.grad(loss)(phi, *rows)
            phi = jax.tree.map(lambda p, g: p - RATE * g, phi, slope)
        return loss(phi, task["query_inputs"], task["query_targets"])

    return (one(0) + one(1)) / 2


def drawn_rows(key):
    """The rows of `minibatch`, by its definition: ⌊n/size⌋ batches of one permutation an epoch."""

    def rows(number, step, leaf):
        own = jax.random.fold_in(key, number)
        epoch, batch = divmod(step, ROWS // SIZE)
        order = jax.random.permutation(jax.random.fold_in(own, epoch), ROWS)
        return leaf[order[batch * SIZE : (batch + 1) * SIZE]]

    return rows


def chunk_of(batch, key):
    return mm.hypergradient.Chunk.of(batch, jnp.array([0.5, 0.5]), key)


@pytest.mark.parametrize("name", DIFFERENTIATE_STEPS)
def test_minibatches_are_those_of_a_loop_by_hand(name, x64):
    key, batch = jax.random.key(7), jax.tree.map(jnp.float64, tasks(ROWS))
    theta = jax.tree.map(jnp.float64, THETA)
    inner = mm.InnerLoop(optax.sgd(RATE), STEPS, view=minibatch(SIZE, is_data))
    estimator = ESTIMATORS[name].make()
    found = jax.jit(lambda t: estimator(PROBLEM, inner, t, chunk_of(batch, key)))(theta)
    exact = jax.value_and_grad(by_hand)(theta, batch, drawn_rows(key))
    np.testing.assert_allclose(jnp.mean(found.loss), exact[0], rtol=1e-9)
    chex.assert_trees_all_close(found.gradient, exact[1], rtol=1e-6, atol=1e-8)


def test_an_evaluation_sees_the_same_minibatches():
    key, batch = jax.random.key(7), tasks(ROWS)
    inner = mm.InnerLoop(optax.sgd(RATE), STEPS, view=minibatch(SIZE, is_data))
    found = mm.evaluate(PROBLEM, inner, THETA, batch, key=key)
    np.testing.assert_allclose(
        jnp.mean(found.loss), by_hand(THETA, batch, drawn_rows(key)), rtol=1e-5
    )


def own_update(problem, params, state, context, step, key):
    slope = jax.grad(problem.inner_loss)(params, context)
    moved = jax.tree.map(lambda p, g: p - RATE * g, params, slope)
    return moved, state, optax.tree.norm(slope)


def test_a_solver_of_ones_own_sees_the_same_minibatches(x64):
    key, batch = jax.random.key(7), jax.tree.map(jnp.float64, tasks(ROWS))
    theta = jax.tree.map(jnp.float64, THETA)
    own = mm.inner.InnerSolver(lambda problem, params, context: (), own_update)
    inner = mm.InnerLoop(own, STEPS, view=minibatch(SIZE, is_data))
    exact = jax.value_and_grad(by_hand)(theta, batch, drawn_rows(key))
    unrolled = mm.hypergradient.unrolled()
    found = jax.jit(lambda t: unrolled(PROBLEM, inner, t, chunk_of(batch, key)))(theta)
    chex.assert_trees_all_close(found.gradient, exact[1], rtol=1e-6, atol=1e-9)
    evaluated = mm.evaluate(PROBLEM, inner, theta, batch, key=key)
    np.testing.assert_allclose(jnp.mean(evaluated.loss), exact[0], rtol=1e-6)


@pytest.mark.parametrize("name", ["unrolled", "forward_mode"])
def test_data_with_an_axis_of_steps_are_walked_through(name):
    batch = tasks(STEPS, 3)
    inner = mm.InnerLoop(optax.sgd(RATE), STEPS, view=step_by_step(is_data))
    estimator = ESTIMATORS[name].make()
    found = jax.jit(lambda t: estimator(PROBLEM, inner, t, chunk_of(batch, KEYS[0])))(THETA)
    exact = jax.grad(by_hand)(THETA, batch, lambda number, step, leaf: leaf[step])
    chex.assert_trees_all_close(found.gradient, exact, rtol=1e-4, atol=1e-5)


def test_a_view_of_everything_changes_no_bit():
    batch = tasks(ROWS)
    found = []
    for view in (None, lambda context, key, step: context):
        inner = mm.InnerLoop(optax.sgd(RATE), STEPS, view=view)
        step = mm.make_meta_step(PROBLEM, inner, mm.hypergradient.unrolled(), optax.sgd(0.1))
        found.append(step(step.init(THETA), batch)[0].meta_params)
    chex.assert_trees_all_equal(*found)


def test_chunks_and_devices_draw_the_same_rows():
    batch = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), tasks(ROWS))
    inner = mm.InnerLoop(optax.sgd(RATE), STEPS, view=minibatch(SIZE, is_data))
    losses = []
    for chunk, mesh in ((4, None), (1, None), (1, mm.meta.task_mesh(jax.devices()[:2]))):
        step = mm.make_meta_step(
            PROBLEM,
            inner,
            mm.hypergradient.first_order(),
            optax.sgd(0.1),
            task_chunk=chunk,
            mesh=mesh,
        )
        _, metrics = step(step.init(THETA), batch)
        losses.append(np.asarray(metrics.tasks.loss))
    assert len(set(losses[0].tolist())) == 4  # tasks of the same data draw other rows
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)
    np.testing.assert_allclose(losses[0], losses[2], rtol=1e-6)


@pytest.mark.parametrize(
    "view",
    [
        lambda context, key, step: (context[0], jax.tree.map(lambda x: x[: step + 1], context[1])),
        lambda context, key, step: context[0] if step > 1 else context,
    ],
)
def test_a_view_whose_shapes_depend_on_the_step_is_named(view):
    inner = mm.InnerLoop(optax.sgd(RATE), STEPS, view=view)
    with pytest.raises(ValueError, match="view: found one whose shapes depend on the step"):
        mm.evaluate(PROBLEM, inner, THETA, tasks(ROWS))


def test_a_view_of_another_structure_is_named():
    inner = mm.InnerLoop(optax.sgd(RATE), STEPS, view=lambda context, key, step: context[1])
    with pytest.raises(ValueError, match="view: expected a context like the given"):
        mm.evaluate(PROBLEM, inner, THETA, tasks(ROWS))


def test_bad_views_are_named():
    context = (THETA, jax.tree.map(lambda leaf: leaf[0], tasks(ROWS)))
    for view, message in (
        (minibatch(ROWS + 1, is_data), "size: expected at most the 6 rows"),
        (minibatch(2, lambda path: False), "of: chooses leaves with no rows"),
        (
            minibatch(2, lambda path: path.startswith("1/")),
            r"of: chooses leaves with \[6, 7\] rows",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            view(context, jax.random.key(0), jnp.int32(0))
    with pytest.raises(ValueError, match="size: expected a whole number"):
        minibatch(0, is_data)


def rows_of_epoch(count, size, key):
    """The rows of all steps of one epoch, one after the other."""
    view = minibatch(size, of=lambda path: path == "rows")
    context = {"rows": jnp.arange(count)}
    steps = jnp.arange(count // size, dtype=jnp.int32)
    return jax.vmap(lambda step: view(context, key, step)["rows"])(steps).ravel()


@pytest.mark.parametrize("count", [512, 513, 1024, 1025, 5000])
def test_an_epoch_has_every_row_once(count):
    for key in jax.random.split(jax.random.key(0), 3):
        found = np.asarray(rows_of_epoch(count, 1, key))
        assert sorted(found) == list(range(count))
        assert np.mean(found == np.arange(count)) < 0.02


def test_rows_that_are_not_sorted_are_as_likely_one_as_another():
    count, keys = 600, jax.random.split(jax.random.key(1), 6000)
    view = minibatch(2, of=lambda path: path == "rows")
    context = {"rows": jnp.arange(count)}
    drawn = np.asarray(jax.vmap(lambda key: view(context, key, jnp.int32(5))["rows"])(keys))
    cells = drawn[:, 0] // 30 * 20 + drawn[:, 1] // 30
    for each, number in ((drawn[:, 0], count), (drawn[:, 1], count), (cells, 400)):
        expected = len(keys) / number
        square = np.sum((np.bincount(each, minlength=number) - expected) ** 2 / expected)
        assert abs(square / number - 1) < 4 * np.sqrt(2 / number)  # χ², four of its deviations


@pytest.mark.parametrize("name", ["unrolled", "forward_mode"])
def test_steps_on_many_rows_are_differentiated(name):
    key, batch = jax.random.key(7), tasks(600)
    inner = mm.InnerLoop(optax.sgd(RATE), STEPS, view=minibatch(SIZE, is_data))
    estimator = ESTIMATORS[name].make()
    found = jax.jit(lambda t: estimator(PROBLEM, inner, t, chunk_of(batch, key)))(THETA)

    def rows(number, step, leaf):
        cut, own = minibatch(SIZE, lambda path: path == "leaf"), jax.random.fold_in(key, number)
        return cut({"leaf": leaf}, own, jnp.int32(step))["leaf"]

    exact = jax.grad(by_hand)(THETA, batch, rows)
    chex.assert_trees_all_close(found.gradient, exact, rtol=1e-4, atol=1e-5)
