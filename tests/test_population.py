"""Inner loops that live across meta-steps: windows, lives, resets, every estimator of the list."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import EXAMPLES

import memmeta as mm
from memmeta.hypergradient import ESTIMATORS, unrolled
from memmeta.inner import minibatch
from memmeta.meta import WarmStart, lifetimes, reset_every
from memmeta.runs import checkpoints

pytestmark = pytest.mark.slow

MEMBERS, ROWS, SIZE, ALL = 3, 6, 2, 4
ADAM = optax.adam(0.1, eps_root=1e-8)
FROZEN = optax.sgd(0.0)


def is_data(path):
    return path in ("1/inputs", "1/targets")


def loss(phi, inputs, targets):
    return jnp.mean((jnp.tanh(inputs @ phi["in"]) @ phi["out"] - targets) ** 2)


PROBLEM = mm.Problem(
    embed=lambda theta, task: (theta, task),
    inner_loss=lambda phi, c: (
        loss(phi, c[1]["inputs"], c[1]["targets"]) + 0.1 * optax.tree.norm(phi, squared=True)
    ),
    outer_loss=lambda phi, c: (
        loss(phi, c[1]["query"], c[1]["targets"]),
        {},
    ),
    init=lambda theta: theta,
)
PULLED = dataclasses.replace(
    PROBLEM,
    inner_loss=lambda phi, c: (
        PROBLEM.inner_loss(phi, c)
        + optax.tree.norm(jax.tree.map(jnp.subtract, phi, c[0]), squared=True)
    ),
)
"""With a proximal term, for estimators that do not see where a loop began."""


def start():
    theta = {"in": 0.5 + 0.1 * jnp.arange(8.0).reshape(2, 4), "out": jnp.linspace(0.5, 1.0, 4)}
    keys = jax.random.split(jax.random.key(0), 3)
    tasks = {
        "inputs": jax.random.normal(keys[0], (MEMBERS, ROWS, 2)),
        "targets": jax.random.normal(keys[1], (MEMBERS, ROWS)),
        "query": jax.random.normal(keys[2], (MEMBERS, ROWS, 2)),
    }
    return theta, tasks


def population(steps, estimator=None, problem=PROBLEM, solver=ADAM, outer=FROZEN, **options):
    view = minibatch(SIZE, is_data) if problem in (PROBLEM, PULLED) else None
    inner = mm.InnerLoop(solver, steps, view=view)
    step = mm.make_meta_step(problem, inner, estimator or unrolled(), outer)
    return WarmStart(step, MEMBERS, **options)


def test_windows_are_one_long_loop_cut_in_pieces(x64):
    """With θ held, two windows of 2 steps end where one of 4 does: φ, Adam's state, the draws."""
    theta, tasks = start()
    ends = []
    for steps in (2, ALL):
        step = population(steps)
        state = step.init(theta, tasks)
        for _ in range(ALL // steps):
            state, metrics = step(state, tasks)
        ends.append(state.memory)
        assert metrics.tasks.report.inner_steps.tolist() == [steps] * MEMBERS
    chex.assert_trees_all_close(*ends, rtol=1e-12, atol=1e-15)


def test_one_window_is_the_exact_unrolled_gradient(x64):
    """And the second one that of a loop from a constant, with the solver's state and the draws."""
    theta, tasks = start()
    step = population(ALL)
    state = step.init(theta, tasks)
    keys = jax.random.wrap_key_data(state.memory.key)

    def window(theta, params, optimizer, first):
        def one(task, key, phi, inner):
            for count in range(first, first + ALL):
                epoch, batch = divmod(count, ROWS // SIZE)
                order = jax.random.permutation(jax.random.fold_in(key, epoch), ROWS)
                rows = order[batch * SIZE : (batch + 1) * SIZE]
                seen = task | {name: task[name][rows] for name in ("inputs", "targets")}
                slope = jax.grad(PROBLEM.inner_loss)(phi, (theta, seen))
                with jax.numpy_dtype_promotion("standard"):
                    change, inner = ADAM.update(slope, inner)
                phi = optax.apply_updates(phi, change)
            return PROBLEM.outer_loss(phi, (theta, task))[0], phi, inner

        losses, *end = jax.vmap(one)(tasks, keys, params, optimizer)
        return jnp.mean(losses), tuple(end)

    def from_start(theta):
        params = jax.tree.map(lambda leaf: jnp.stack([leaf] * MEMBERS), theta)
        return window(theta, params, jax.vmap(ADAM.init)(params), 0)

    whole = jax.jit(jax.grad(from_start, has_aux=True))
    gradient, _, memory = step.step.gradient_remembering(state.meta, tasks, state.memory)
    exact, end = whole(theta)
    chex.assert_trees_all_close(gradient, exact, rtol=1e-9, atol=1e-12)
    chex.assert_trees_all_close((memory.params, memory.solver), end, rtol=1e-9, atol=1e-12)
    gradient, _, _ = step.step.gradient_remembering(state.meta, tasks, memory)
    exact, _ = jax.jit(jax.grad(lambda t: window(t, *end, ALL), has_aux=True))(theta)
    chex.assert_trees_all_close(gradient, exact, rtol=1e-9, atol=1e-12)


def example_for(name):
    return EXAMPLES["head" if ESTIMATORS[name].heads else "network"](MEMBERS)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_estimator_goes_on_from_its_memory(name):
    """Two windows of a step make φ of two steps, in a state that is as large as before."""
    example, inner = example_for(name), mm.InnerLoop(optax.sgd(0.1), 2)
    step = population(1, ESTIMATORS[name].make(), example.problem, optax.sgd(0.1))
    state = step.init(example.theta, example.tasks)
    shapes = jax.eval_shape(lambda s: s, state)
    for _ in range(2):
        state, metrics = step(state, example.tasks)
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, jax.eval_shape(lambda s: s, state))
    assert metrics.used == MEMBERS
    assert metrics.counts.reset == 0
    assert state.memory.steps.tolist() == [2] * MEMBERS

    @jax.jit
    @jax.vmap
    def loop(task):
        problem, theta = example.problem, example.theta
        return inner(problem, problem.init(theta), problem.embed(theta, task))

    found = jax.tree.map(jnp.asarray, state.memory.params)
    chex.assert_trees_all_close(found, loop(example.tasks), rtol=1e-5, atol=1e-6)


def test_lives_end_by_a_condition_and_begin_at_the_present_theta():
    theta, tasks = start()
    step = population(2, outer=optax.sgd(0.1), reset=reset_every(4))
    state = step.init(theta, tasks)
    first_keys, ages = np.asarray(state.memory.key), []
    for _ in range(3):
        state, metrics = step(state, tasks)
        ages.append(state.memory.steps.tolist())
    assert ages == [[2] * MEMBERS, [0] * MEMBERS, [2] * MEMBERS]
    assert metrics.counts.reset == 0
    assert not np.any(np.all(np.asarray(state.memory.key) == first_keys, axis=1))
    state, _ = step(state, tasks)
    at_theta = jax.tree.map(lambda leaf: jnp.stack([leaf] * MEMBERS), state.meta.meta_params)
    chex.assert_trees_all_equal(state.memory.params, at_theta)


def test_lifetimes_are_drawn_for_each_member_and_life():
    condition, keys = lifetimes(5, 20), jax.random.split(jax.random.key(0), 50)
    ends = [next(n for n in range(1, 30) if condition(key, jnp.int32(n), None)) for key in keys]
    assert min(ends) >= 5
    assert max(ends) <= 20
    assert len(set(ends)) > 8
    with pytest.raises(ValueError, match="most: expected at least 5"):
        lifetimes(5, 4)
    with pytest.raises(ValueError, match="steps: expected"):
        reset_every(0)


def test_a_condition_sees_the_report():
    theta, tasks = start()
    step = population(2, reset=lambda key, steps, report: report.inner_gradient_norm > 0)
    state, _ = step(step.init(theta, tasks), tasks)
    assert state.memory.steps.tolist() == [0] * MEMBERS


@pytest.mark.parametrize("on_host", [False, True])
def test_a_member_that_diverges_is_reset_and_counted(on_host):
    theta, tasks = start()
    tasks["targets"] = tasks["targets"].at[1].mul(1e30)
    step = population(2, outer=optax.sgd(1e-3), on_host=on_host)
    state = step.init(theta, tasks)
    state, metrics = step(state, tasks)
    assert metrics.counts.reset == 1
    assert metrics.used == MEMBERS - 1
    assert "1 member(s) set back" in mm.explain(metrics)
    assert np.asarray(state.memory.steps).tolist() == [2, 0, 2]
    chex.assert_tree_all_finite(state.memory)
    state, metrics = step(state, tasks)
    assert np.asarray(state.memory.steps).tolist() == [4, 0, 4]
    chex.assert_tree_all_finite(state.meta.meta_params)


def test_a_resumed_run_gives_the_same_bits(tmp_path):
    theta, tasks = start()
    step = population(2, outer=optax.adam(0.01), reset=lifetimes(4, 8))
    state = step.init(theta, tasks, jax.random.key(3))
    for _ in range(3):
        state, _ = step(state, tasks)
    checkpoints.save(tmp_path / "checkpoints", 3, state)
    restored = checkpoints.restore(tmp_path / "checkpoints", step.init(theta, tasks))
    for _ in range(4):
        state, _ = step(state, tasks)
        restored, _ = step(restored, tasks)
    chex.assert_trees_all_equal(
        *(
            s._replace(meta=s.meta._replace(key=jax.random.key_data(s.meta.key)))
            for s in (state, restored)
        )
    )


H = {"implicit": mm.hypergradient.implicit, "unrolled": unrolled}


@pytest.mark.parametrize("name", H)
def test_host_device_and_some_of_the_members_agree(name):
    theta, tasks = start()
    found = []
    for on_host in (False, True):
        step = population(2, H[name](), PULLED, outer=optax.sgd(0.1), on_host=on_host)
        state = step.init(theta, tasks)
        for numbers in ([2, 0], [1, 2]):
            some = jax.tree.map(lambda leaf, n=numbers: leaf[jnp.array(n)], tasks)
            state, _ = step(state, some, jnp.array(numbers))
        found.append((state.memory, state.meta.meta_params))
        assert np.asarray(state.memory.steps).tolist() == [2, 2, 4]
    chex.assert_trees_all_close(*found, rtol=1e-5, atol=1e-6)


def bytes_of_windows(name, steps, count):
    """Temporary memory of a compiled run of so many windows of so many inner steps."""
    example = example_for(name)
    step = population(steps, ESTIMATORS[name].make(), example.problem, optax.sgd(0.1))

    def run(state):
        def body(state, _):
            return step.update(state, example.tasks)[0], None

        return jax.lax.scan(body, state, length=count)[0]

    state = step.init(example.theta, example.tasks)
    return jax.jit(run).lower(state).compile().memory_analysis().temp_size_in_bytes


def in_every_run(name):
    return pytest.param(name, marks=[] if name in ("implicit", "unrolled") else pytest.mark.slow)


@pytest.mark.parametrize("name", [in_every_run(name) for name in ESTIMATORS])
def test_memory_is_flat_in_windows(name):
    """So that it does not grow with all inner steps together, which are steps times windows."""
    assert bytes_of_windows(name, 2, 1000) <= bytes_of_windows(name, 2, 10) + 64


def test_a_rule_that_returns_no_state_is_named():
    def rule(problem, inner, begin):
        state = inner.run(problem, begin.params, begin.context.whole, begin.key)
        report = mm.hypergradient.report_of_loop(state)
        return mm.hypergradient.TaskGradient(jnp.float32(0), {}, None, None, report)

    theta, tasks = start()
    step = population(2, mm.hypergradient.per_task(rule, "mine"))
    with pytest.raises(ValueError, match="mine: found a rule that returns no state"):
        step.init(theta, tasks)
