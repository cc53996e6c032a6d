"""Tasks spread over devices: the same numbers, the same episodes, one message a meta-step."""

import inspect
import re
from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from problems import quadratic_problem, quadratic_tasks

import memmeta as mm
from memmeta.few_shot.algorithms import METHODS
from memmeta.hypergradient import ESTIMATORS
from memmeta.runs import Config, make_trainer

pytestmark = pytest.mark.slow

SPREAD = PartitionSpec("tasks")
KINDS = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|collective-broadcast"
MESSAGE = re.compile(rf" ({KINDS})(?:-start)?\(")
QUICK = ("implicit", "unrolled", "forward_mode-random", "first_order", "memory_reduced", "maml")


def some_are_slow(names):
    return [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in names]


# reptile needs a start that is learned: as a method it is below
ANY_PROBLEM = some_are_slow(
    name for name, entry in ESTIMATORS.items() if not entry.heads and name != "reptile"
)


def mesh_of(count):
    return mm.meta.task_mesh(jax.devices()[:count])


def spread_over(mesh, tasks):
    return tasks if mesh is None else jax.device_put(tasks, NamedSharding(mesh, SPREAD))


def messages(program):
    """The name of each message between devices in a compiled program."""
    return MESSAGE.findall(program.as_text())


def make_step(name="implicit", mesh=None, chunk=None, optimizer=None):
    return mm.make_meta_step(
        quadratic_problem(),
        mm.InnerLoop(steps=20),
        ESTIMATORS[name].make(),
        optimizer or optax.sgd(0.1),
        task_chunk=chunk,
        mesh=mesh,
    )


def assert_close(first, second, tolerance=1e-10):
    chex.assert_trees_all_close(first, second, rtol=tolerance, atol=tolerance)


def without_iterations(metrics):
    """Rounding decides whether a linear solver that is done makes one step more."""

    def without(found):
        return found._replace(report=found.report._replace(linear_iterations=None))

    return without(metrics)._replace(tasks=without(metrics.tasks))


@pytest.mark.parametrize("name", ANY_PROBLEM)
def test_eight_devices_give_what_one_gives(x64, name):
    tasks = quadratic_tasks(jax.random.key(1), tasks=8)
    theta = jnp.linspace(-1.0, 1.0, 4)
    found = []
    for mesh in (None, mesh_of(8)):
        step = make_step(name, mesh)
        found.append(step(step.init(theta, jax.random.key(4)), tasks))
    (alone, alone_metrics), (spread, metrics) = found
    assert_close(alone.meta_params, spread.meta_params)
    assert_close(without_iterations(alone_metrics), without_iterations(metrics))
    if (count := metrics.tasks.report.linear_iterations) is not None:
        np.testing.assert_allclose(alone_metrics.tasks.report.linear_iterations, count, atol=1)
    assert metrics.tasks.loss.sharding.spec == SPREAD


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("count", "chunk"),
    [(2, 2), pytest.param(2, None, marks=SLOW), pytest.param(4, 1, marks=SLOW)],
)
def test_chunks_and_masks_on_several_devices(x64, count, chunk):
    tasks = quadratic_tasks(jax.random.key(1), tasks=8)
    tasks = tasks._replace(target=tasks.target.at[5].set(jnp.nan))
    theta = jnp.linspace(-1.0, 1.0, 4)
    alone, several = make_step(), make_step(mesh=mesh_of(count), chunk=chunk)
    exact, metrics = alone.gradient(alone.init(theta), tasks)
    gradient, found = several.gradient(several.init(theta), tasks)
    assert_close(exact, gradient)
    assert int(found.counts.masked) == 1
    assert_close(metrics.report.smallest_curvature, found.report.smallest_curvature)


def test_solves_that_stop_in_time_send_no_message(x64):
    """Each device's loop runs until its own slowest task has ended."""
    solver = mm.linear_solve.cg(20, tolerance=1e-8)
    step = mm.make_meta_step(
        quadratic_problem(),
        mm.InnerLoop(steps=20),
        mm.hypergradient.implicit(solver),
        optax.sgd(0.1),
        mesh=mesh_of(4),
    )
    tasks = quadratic_tasks(jax.random.key(1), tasks=8)
    theta = jnp.linspace(-1.0, 1.0, 4)
    lowered = step.compiled.lower(step.init(theta), spread_over(step.mesh, tasks))
    assert messages(lowered.compile()) == ["all-reduce"]
    _, metrics = step(step.init(theta), spread_over(step.mesh, tasks))
    assert np.all(metrics.tasks.report.linear_residual <= 1e-8)


@pytest.mark.parametrize("name", ["implicit", "unrolled"])
@pytest.mark.parametrize("x64_on", [False, True])
def test_one_message_a_meta_step(name, x64_on):
    with jax.enable_x64(x64_on):
        step = make_step(name, mesh_of(8), chunk=1, optimizer=optax.adam(0.1))
        tasks = spread_over(step.mesh, quadratic_tasks(jax.random.key(1), tasks=16))
        lowered = step.compiled.lower(step.init(jnp.ones(4)), tasks)
        found = messages(lowered.compile())
    assert found == ["all-reduce"]


@pytest.mark.parametrize("name", some_are_slow(METHODS))
def test_every_method_on_four_devices_is_that_on_one_with_one_message(name):
    network = mm.models.mlp(2, widths=(4,), input_shape=(3,))
    inner = {"inner": mm.InnerLoop(optax.sgd(0.1), steps=2)}
    takes_inner = "inner" in inspect.signature(METHODS[name]).parameters
    takes_inner &= name != "meta_sgd"  # its loop reads the learned rates
    learner = METHODS[name](network, **(inner if takes_inner else {}))
    labels = jnp.tile(jnp.arange(4, dtype=jnp.int32) % 2, (4, 1))
    images = jax.random.normal(jax.random.key(0), (2, 4, 4, 3)) + labels[..., None].astype(
        jnp.float32
    )
    found = []
    for mesh in (None, mesh_of(4)):
        parts = (learner.problem, learner.inner, learner.estimator, optax.sgd(0.1))
        step = mm.make_meta_step(*parts, mesh=mesh)
        tasks = spread_over(step.mesh, mm.Task(images[0], labels, images[1], labels))
        state = step.init(learner.init(jax.random.key(1)))
        program = jax.jit(step.update).lower(state, tasks).compile()
        found.append(program(state, tasks))
    assert messages(program) == ["all-reduce"]
    (alone, alone_metrics), (spread, metrics) = found
    assert_close(alone.meta_params, spread.meta_params, 1e-4)
    assert_close(alone_metrics.tasks.loss, metrics.tasks.loss, 1e-4)


@pytest.mark.parametrize("name", some_are_slow(["protonet", "memory_reduced"]))
def test_support_and_query_apart_on_two_devices_in_chunks_with_padding(name):
    """Each pass has the statistics of its own images: the padding of neither part counts."""
    network = mm.models.conv4(2, width=2, depth=1, image_shape=(4, 4, 1))
    labels = jnp.tile(jnp.array([0, 1, 0, 1, -1], jnp.int32), (4, 1)).at[1, 3].set(-1)
    pixels = jax.random.uniform(jax.random.key(0), (2, 4, 5, 4, 4, 1))
    both = jnp.stack([labels, labels.at[2, 0].set(-1)])
    padded = jnp.where(both[..., None, None, None] < 0, 7.0, pixels)
    options = {"inner": mm.InnerLoop(steps=3)} if name == "memory_reduced" else {}

    def after(images, **how):
        learner = METHODS[name](network, statistics="separate", **options)
        step = learner.make_meta_step(optax.sgd(0.1), **how)
        state = step.init(learner.init(jax.random.key(1)))
        tasks = mm.Task(images[0], both[0], images[1], both[1])
        state, metrics = step(state, spread_over(step.mesh, tasks))
        return state.meta_params, metrics.tasks.loss

    spread = after(padded, task_chunk=1, mesh=mesh_of(2))
    assert_close(after(pixels, task_chunk=4), spread, 1e-4)


def test_a_step_on_a_mesh_compiles_once_and_keeps_its_layout():
    adam = optax.adam(0.1)
    once = adam._replace(update=chex.assert_max_traces(adam.update, n=1))
    step = make_step(mesh=mesh_of(4), optimizer=once)
    state = step.init(jnp.ones(4))
    layout = jax.tree.map(lambda leaf: leaf.sharding, state)
    for number in range(3):
        state, _ = step(state, quadratic_tasks(jax.random.key(number), tasks=8))
    same = jax.tree.map(lambda leaf, s: leaf.sharding.is_equivalent_to(s, leaf.ndim), state, layout)
    assert all(jax.tree.leaves(same))


def test_parameters_sharded_over_a_second_axis():
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("tasks", "model"))
    tasks = quadratic_tasks(jax.random.key(1), tasks=8)
    theta = jnp.linspace(-1.0, 1.0, 4)
    step = make_step(mesh=mesh, optimizer=optax.adam(0.1))
    sharding = NamedSharding(mesh, PartitionSpec("model"))
    state = step.init(jax.device_put(theta, sharding))
    assert state.optimizer[0].mu.sharding.spec == PartitionSpec("model")
    alone = make_step(optimizer=optax.adam(0.1))
    expected = alone.init(theta)
    for _ in range(2):
        state, _ = step(state, tasks)
        expected, _ = alone(expected, tasks)
    assert {shard.data.shape for shard in state.meta_params.addressable_shards} == {(2,)}
    assert_close(state.meta_params, expected.meta_params, 1e-5)


@pytest.mark.slow
def test_the_same_episodes_on_any_number_of_devices():
    config = Config("protonet", ways=3, queries=2, test_queries=2, width=2, tasks=8, meta_steps=1)
    batches = []
    for mesh in (None, mesh_of(2), mesh_of(8)):
        trainer = make_trainer(config, mesh)
        batches.append(trainer.batch(trainer.init(), trainer.splits["train"]))
    chex.assert_trees_all_equal(*batches)
    for batch in batches[1:]:
        assert batch.query_inputs.sharding.spec == SPREAD


def test_a_run_is_the_same_on_two_devices_and_from_data_on_the_host():
    config = Config("protonet", ways=2, queries=1, test_queries=1, width=2, tasks=2, meta_steps=4)
    found = []
    for on_host, mesh in ((False, None), (False, mesh_of(2)), (True, None), (True, mesh_of(2))):
        trainer = make_trainer(replace(config, on_host=on_host), mesh)
        block = trainer.compile()
        if mesh is not None:
            assert messages(block.program) == ["all-reduce"]
            batch = trainer.batch(trainer.init(), trainer.splits["train"])
            assert batch.query_inputs.sharding.spec == SPREAD
        state, metrics = block(trainer.init(), trainer.splits["train"], 2)
        assert int(state.step) == 2
        accuracy = trainer.evaluator(state, "test", trainer.judged["any styles"], 3, 3)
        found.append((state.meta_params, metrics.loss, metrics.counts, accuracy))
    for other in found[1:]:
        assert_close(found[0][:3], other[:3], 1e-3)
        assert found[0][3].mean == pytest.approx(other[3].mean, abs=0.2)


def test_an_explicit_mesh_is_taken_as_it_comes():
    step = make_step(mesh=jax.make_mesh((2,), ("tasks",), devices=jax.devices()[:2]))
    tasks, alone = quadratic_tasks(jax.random.key(0), tasks=2), make_step()
    found, expected = (s(s.init(jnp.ones(4)), tasks)[1] for s in (step, alone))
    assert_close(found.tasks.loss, expected.tasks.loss, 1e-6)


@pytest.mark.parametrize(
    ("mesh", "chunk", "tasks", "message"),
    [
        (Mesh(np.array(jax.devices()), ("data",)), None, 8, r"mesh: .*found \('data',\)"),
        (
            mesh_of(8),
            None,
            6,
            "tasks: expected a multiple of the 8 devices they are spread over, found 6",
        ),
        (mesh_of(2), 3, 8, "task_chunk: 3 does not divide the 4 tasks"),
    ],
)
def test_meshes_and_tasks_that_do_not_fit(mesh, chunk, tasks, message):
    batch = quadratic_tasks(jax.random.key(0), tasks=tasks)

    def run():
        step = make_step(mesh=mesh, chunk=chunk)
        return step(step.init(jnp.ones(4)), batch)

    with pytest.raises(ValueError, match=message):
        run()
