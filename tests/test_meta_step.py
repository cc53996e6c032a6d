"""The meta-step: exact gradients, flat memory, chunks, masks, one compilation."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import quadratic_hypergradient, quadratic_problem, quadratic_tasks

import memmeta as mm
from memmeta.data import Episodes, load

ESTIMATORS = {
    "implicit": mm.hypergradient.implicit(mm.linear_solve.cg(10)),
    "unrolled": mm.hypergradient.unrolled(),
}


def small_learner(inner_steps=5):
    network = mm.models.conv4(ways=3, width=4)
    return mm.algorithms.memory_reduced(network, inner=mm.InnerLoop(steps=inner_steps))


def glyph_tasks(count=4):
    return Episodes(3, 1, 2).sample_batch(load("glyphs", "test"), jax.random.key(0), count)


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("chunk", ["auto", 1, 2])
def test_gradient_is_the_closed_form(x64, name, chunk):
    tasks = quadratic_tasks(jax.random.key(1), tasks=4)
    theta = jnp.linspace(-1.0, 1.0, 4)
    step = mm.make_meta_step(
        quadratic_problem(),
        mm.InnerLoop(steps=200),
        ESTIMATORS[name],
        optax.sgd(0.1),
        task_chunk=chunk,
    )
    gradient, metrics = step.gradient(step.init(theta), tasks)
    exact = quadratic_hypergradient(theta, tasks)
    np.testing.assert_allclose(gradient, exact, atol=1e-10)
    assert metrics.counts.masked == 0
    state, _ = step(step.init(theta), tasks)
    np.testing.assert_allclose(state.meta_params, theta - 0.1 * exact, atol=1e-10)


def test_gradient_agrees_with_finite_differences(x64):
    tasks = quadratic_tasks(jax.random.key(2))
    theta = jnp.linspace(-1.0, 1.0, 4)
    step = mm.make_meta_step(
        quadratic_problem(), mm.InnerLoop(steps=300), ESTIMATORS["implicit"], optax.sgd(0.1)
    )

    def mean_loss(theta):
        return step.gradient(step.init(theta), tasks)[1].loss

    gradient, _ = step.gradient(step.init(theta), tasks)
    for axis in range(4):
        shift = 1e-5 * jnp.eye(4)[axis]
        slope = (mean_loss(theta + shift) - mean_loss(theta - shift)) / 2e-5
        np.testing.assert_allclose(gradient[axis], slope, rtol=1e-6, atol=1e-8)


def test_memory_does_not_grow_with_inner_steps():
    network = mm.models.conv4(ways=3, width=4, image_shape=(8, 8, 1), depth=2)
    images, labels = jnp.ones((4, 6, 8, 8, 1)), jnp.zeros((4, 6), jnp.int32)
    sizes = {}
    for steps in (1, 10, 100, 1000):
        learner = mm.algorithms.memory_reduced(network, inner=mm.InnerLoop(steps=steps))
        step = learner.make_meta_step(optax.adam(1e-3), task_chunk=2)
        state = step.init(learner.init(jax.random.key(0)))
        lowered = step.compiled.lower(state, mm.Task(images, labels, images, labels))
        # buffers are decided before machine code is made, which is what takes the time
        compiled = lowered.compile({"xla_backend_optimization_level": 0})
        sizes[steps] = compiled.memory_analysis().temp_size_in_bytes
    assert len(set(sizes.values())) == 1, sizes


def test_chunks_change_nothing_but_rounding():
    learner, tasks = small_learner(), glyph_tasks()
    found = []
    for chunk in (None, 1, 2):
        step = learner.make_meta_step(optax.sgd(0.1), task_chunk=chunk)
        found.append(step(step.init(learner.init(jax.random.key(0))), tasks))
    for state, metrics in found[1:]:
        np.testing.assert_allclose(metrics.tasks.loss, found[0][1].tasks.loss, rtol=1e-4)
        chex.assert_trees_all_close(state.meta_params, found[0][0].meta_params, atol=2e-4)


@pytest.mark.parametrize(
    ("chunk", "platform", "numbers", "expected"),
    [
        ("auto", "cpu", 1, 12),
        ("auto", "cpu", 8192, 4),
        ("auto", "cpu", 5000, 6),
        ("auto", "cpu", 60000, 1),
        ("auto", "gpu", 60000, 12),
        (None, "cpu", 60000, 12),
        (3, "gpu", 1, 3),
    ],
)
def test_tasks_at_once(monkeypatch, chunk, platform, numbers, expected):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    parts = (quadratic_problem(), mm.InnerLoop(), ESTIMATORS["implicit"], optax.sgd(0.1))
    step = mm.make_meta_step(*parts, task_chunk=chunk)
    assert step.chunk(jax.ShapeDtypeStruct((12, numbers), jnp.float32)) == expected


def test_a_task_that_is_not_finite_is_masked_and_counted(x64):
    tasks = quadratic_tasks(jax.random.key(3), tasks=4)
    theta = jnp.linspace(-1.0, 1.0, 4)
    kept = jnp.array([0, 1, 3])
    exact = quadratic_hypergradient(theta, jax.tree.map(lambda leaf: leaf[kept], tasks))
    for field in tasks._fields:
        spoilt = tasks._replace(**{field: getattr(tasks, field).at[2].set(jnp.nan)})
        step = mm.make_meta_step(
            quadratic_problem(), mm.InnerLoop(steps=200), ESTIMATORS["implicit"], optax.sgd(0.1)
        )
        gradient, metrics = step.gradient(step.init(theta), spoilt)
        np.testing.assert_allclose(gradient, exact, atol=1e-10)
        assert int(metrics.counts.masked) == 1
        assert metrics.tasks.usable.tolist() == [True, True, False, True]
        assert np.isfinite(metrics.loss)


def test_a_batch_without_a_finite_task_changes_nothing():
    tasks = quadratic_tasks(jax.random.key(3), tasks=2)
    spoilt = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), tasks)
    step = mm.make_meta_step(
        quadratic_problem(), mm.InnerLoop(steps=5), ESTIMATORS["implicit"], optax.adam(0.1)
    )
    theta = jnp.linspace(-1.0, 1.0, 4)
    state, metrics = step(step.init(theta), tasks)
    before = jax.tree.map(np.asarray, (state.meta_params, state.optimizer))
    state, metrics = step(state, spoilt)
    assert int(metrics.counts.masked) == 2
    chex.assert_trees_all_equal(before, (state.meta_params, state.optimizer))
    assert int(state.step) == 2


def test_a_step_compiles_once_and_moves_nothing_to_the_host():
    learner, tasks = small_learner(), glyph_tasks()
    adam = optax.adam(1e-3)
    once = chex.assert_max_traces(adam.update, n=1)
    step = learner.make_meta_step(adam._replace(update=once))
    state, _ = step(step.init(learner.init(jax.random.key(0))), tasks)
    with jax.transfer_guard("disallow"):
        for _ in range(3):
            state, _ = step(state, tasks)


def test_the_users_parameters_survive_donation():
    step = mm.make_meta_step(
        quadratic_problem(), mm.InnerLoop(steps=5), ESTIMATORS["implicit"], optax.sgd(0.1)
    )
    theta = jnp.linspace(-1.0, 1.0, 4)
    before = np.array(theta)
    step(step.init(theta), quadratic_tasks(jax.random.key(0)))
    np.testing.assert_array_equal(theta, before)


def test_integer_and_key_leaves_are_carried_along():
    problem = quadratic_problem()
    wrapped = dataclasses.replace(
        problem,
        embed=lambda theta, batch: problem.embed(theta["weight"], batch),
        init=lambda theta: problem.init(theta["weight"]),
    )
    theta = {"weight": jnp.ones(4), "version": jnp.int32(3), "key": jax.random.key(5)}
    step = mm.make_meta_step(
        wrapped, mm.InnerLoop(steps=5), ESTIMATORS["implicit"], optax.adam(0.1)
    )
    state, _ = step(step.init(theta), quadratic_tasks(jax.random.key(0)))
    assert int(state.meta_params["version"]) == 3
    assert state.meta_params["key"] == jax.random.key(5)
    # Adam's first step is its rate in every coordinate
    np.testing.assert_allclose(np.abs(state.meta_params["weight"] - 1), 0.1, rtol=1e-4)


@pytest.mark.parametrize(
    ("tasks", "chunk", "message"),
    [
        (jnp.ones((6, 2)), 4, "task_chunk: 4 does not divide the 6 tasks"),
        (jnp.ones((0, 2)), None, "tasks: expected at least one task, found 0"),
        (jnp.float32(1), None, "tasks: every leaf needs the same leading axis"),
        ((jnp.ones(2), jnp.ones(3)), None, "tasks: every leaf needs the same leading axis"),
        ((), None, "no leaf at all"),
    ],
)
def test_wrong_tasks_are_named(tasks, chunk, message):
    step = mm.make_meta_step(
        quadratic_problem(),
        mm.InnerLoop(),
        ESTIMATORS["implicit"],
        optax.sgd(0.1),
        task_chunk=chunk,
    )
    with pytest.raises(ValueError, match=message):
        step(step.init(jnp.ones(4)), tasks)


def test_wrong_settings_are_named():
    with pytest.raises(
        ValueError, match="task_chunk: expected a whole number, 1 or more, below 2³¹, found 0"
    ):
        mm.make_meta_step(
            quadratic_problem(),
            mm.InnerLoop(),
            ESTIMATORS["implicit"],
            optax.sgd(0.1),
            task_chunk=0,
        )
    with pytest.raises(ValueError, match="steps: expected a whole number"):
        mm.InnerLoop(steps=-1)
    step = mm.make_meta_step(
        quadratic_problem(), mm.InnerLoop(), ESTIMATORS["implicit"], optax.sgd(0.1)
    )
    with pytest.raises(ValueError, match="meta_params: found no floating-point leaf"):
        step.init({"count": jnp.int32(1)})


@pytest.mark.parametrize("size", [10, 5_000, 70_000])
@pytest.mark.parametrize("place", [0, 3, -1])
def test_one_bad_number_is_found_in_any_array(size, place):
    """XLA's maximum of a long vector forgets a NaN in it (jax 0.10.2, CPU)."""

    def outer_loss(phi, c):  # finite, without a derivative where φ is what it should be
        return jnp.sum(jnp.sqrt((phi - c[1]) ** 2)), {}

    problem = mm.Problem(
        embed=lambda theta, task: (theta, task),
        inner_loss=lambda phi, c: 0.5 * jnp.sum((phi - c[0]) ** 2),
        outer_loss=outer_loss,
        init=jnp.zeros_like,
    )

    def spoilt(updates, state, params=None):
        return updates.at[place].set(jnp.nan), state

    def one_step(tasks, optimizer):
        inner = mm.InnerLoop(optax.sgd(0.5), 1)
        step = mm.make_meta_step(
            problem, inner, mm.hypergradient.unrolled(), optimizer, task_chunk=1
        )
        state, metrics = step(step.init(jnp.zeros(size)), tasks)
        assert jnp.isfinite(state.meta_params).all()
        return metrics.counts

    good = jnp.ones((2, size))
    assert one_step(good.at[0, place].set(jnp.nan), optax.identity()).inputs == 1
    assert one_step(good.at[0, place].set(0), optax.identity()).hypergradient == 1
    broken = optax.GradientTransformation(lambda params: optax.EmptyState(), spoilt)
    assert one_step(good, broken).refused == 1
