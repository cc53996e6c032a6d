"""θ, φ, the solver's vectors and data sharded over a second axis of the mesh."""

import math
from contextlib import nullcontext

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import memmeta as mm
from benchmarks.harness.programs import collectives

pytestmark = pytest.mark.slow

LAYERS, WIDTH, EXAMPLES = 16, 32, 8
ROWS = P(None, "model")
DATA = P("tasks", "model")
POLICIES = jax.checkpoint_policies
SLOW = pytest.mark.slow
H = mm.hypergradient
CG = mm.linear_solve.cg(3)
ESTIMATORS = {
    "implicit": H.implicit(CG),
    "unrolled": H.unrolled("step"),
    "mixed_mode": H.mixed_mode(),
    "truncated": H.truncated(2),
}


def network(phi, x, policy):
    def layer(x, matrix):
        return jnp.tanh(checkpoint_name(x @ matrix, "product")), None

    return jax.lax.scan(jax.checkpoint(layer, policy=policy, prevent_cse=False), x, phi)[0]


def make_problem(policy=POLICIES.nothing_saveable, init=lambda theta: theta):
    """Dense layers that all adapt, near θ."""

    def inner_loss(phi, context):
        theta, (support, _) = context
        fit = jnp.mean((network(phi, support, policy) - 1) ** 2)
        return fit + 0.5 * jnp.sum((phi - theta) ** 2)

    def outer_loss(phi, context):
        return jnp.mean((network(phi, context[1][1], policy) + 1) ** 2), {}

    return mm.Problem(lambda theta, task: (theta, task), inner_loss, outer_loss, init)


def theta_and_tasks(dtype=jnp.float32, width=WIDTH, tasks=2):
    keys = jax.random.split(jax.random.key(0), 3)
    theta = jax.random.normal(keys[0], (LAYERS, width, width), dtype) * width**-0.5
    size = (tasks, EXAMPLES, width)
    return theta, tuple(jax.random.normal(key, size, dtype) for key in keys[1:])


def mesh_of(tasks, model, kind=AxisType.Auto):
    devices = np.array(jax.devices()[: tasks * model]).reshape(tasks, model)
    return Mesh(devices, ("tasks", "model"), axis_types=(kind, kind))


def on(mesh, theta, tasks):
    put = lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec))  # noqa: E731
    return put(theta, ROWS), jax.tree.map(lambda leaf: put(leaf, DATA), tasks)


def make_step(mesh=None, estimator="implicit", problem=None, **options):
    return mm.make_meta_step(
        problem or make_problem(),
        mm.InnerLoop(optax.sgd(0.1), steps=3),
        ESTIMATORS[estimator],
        optax.adam(0.01),
        task_chunk=1,
        mesh=mesh,
        **options,
    )


def compiled(step, theta, tasks):
    state = step.init(theta)
    return step.compiled.lower(state, tasks).compile(), state


def gathered(program):
    """Bytes of the largest array that a device is sent whole."""
    return max(size for kind, size in collectives(program) if kind == "all-gather")


def test_a_device_of_eight_holds_an_eighth():
    """φ = θ: parameters, moments, φ, the solver's vectors and data."""
    theta, tasks = theta_and_tasks()
    found = []
    for model in (1, 8):
        mesh = mesh_of(1, model)
        program, state = compiled(make_step(mesh), *on(mesh, theta, tasks))
        memory = program.memory_analysis()
        found.append((memory.argument_size_in_bytes, memory.temp_size_in_bytes))
    (whole, whole_temporary), (eighth, temporary) = found
    assert eighth <= 1.01 * whole / 8
    # beside its eighth each device has some layers at once, gathered or as a gradient not yet cut
    layer = WIDTH**2 * theta.dtype.itemsize
    assert temporary <= whole_temporary / 8 + 6 * layer
    assert eighth + temporary <= 1.2 * (whole + whole_temporary) / 8
    assert gathered(program) == layer
    kinds = [kind for kind, _ in collectives(program)]
    assert set(kinds) <= {"all-gather", "all-reduce", "all-to-all", "collective-permute"}
    assert state.optimizer[0].mu.sharding.spec == ROWS


@pytest.mark.parametrize(
    "estimator",
    ["implicit", "unrolled", *[pytest.param(n, marks=SLOW) for n in ("mixed_mode", "truncated")]],
)
def test_the_numbers_are_those_of_one_device(x64, estimator):
    theta, tasks = theta_and_tasks(jnp.float64)
    alone = make_step(estimator=estimator)
    expected, _ = alone(alone.init(theta), tasks)
    mesh = mesh_of(2, 4)
    theta, tasks = on(mesh, theta, tasks)
    program, state = compiled(make_step(mesh, estimator), theta, tasks)
    state, metrics = program(state, tasks)
    chex.assert_trees_all_close(state.meta_params, expected.meta_params, rtol=1e-9, atol=1e-9)
    assert {shard.data.shape for shard in state.meta_params.addressable_shards} == {(LAYERS, 8, 32)}
    assert metrics.tasks.loss.sharding.spec == P("tasks")
    assert gathered(program) == 8 * WIDTH**2  # a layer
    # one message between the tasks' devices carries the gradient, each device's part of it
    whole = math.prod(theta.shape) * 8 // 4
    assert sum(whole <= size < whole + 1000 for _, size in collectives(program)) == 1


@pytest.mark.parametrize("ambient", [False, True])
def test_an_explicit_mesh_is_accepted_as_it_is(ambient):
    theta, tasks = theta_and_tasks(width=8)
    alone = make_step()
    expected, _ = alone(alone.init(theta), tasks)
    mesh = jax.make_mesh((2, 4), ("tasks", "model"))
    assert AxisType.Explicit in mesh.axis_types
    theta, tasks = on(mesh, theta, tasks)
    with jax.set_mesh(mesh) if ambient else nullcontext():
        step = make_step(mesh)
        state = step.init(theta)
        types = jax.tree.map(jax.typeof, state)
        state, metrics = step(state, tasks)
        assert jax.tree.map(jax.typeof, state) == types
        assert "model" in str(jax.typeof(state.optimizer[0].mu))
        assert float(metrics.loss + 1) > 1
        assert mm.explain(metrics)
        chex.assert_trees_all_close(np.asarray(state.meta_params), expected.meta_params, rtol=1e-4)
        gradient, _ = jax.jit(step.gradient)(state, tasks)
        assert jax.typeof(gradient) == jax.typeof(state.meta_params)


@pytest.mark.slow
def test_a_block_of_meta_steps_on_an_explicit_mesh():
    theta, tasks = theta_and_tasks(width=8)
    alone = make_step()
    expected = alone.init(theta)
    for _ in range(2):
        expected, _ = alone(expected, tasks)
    mesh = jax.make_mesh((2, 4), ("tasks", "model"))
    step = make_step(mesh)
    theta, tasks = on(mesh, theta, tasks)

    @jax.jit
    def block(state):
        return jax.lax.scan(lambda state, _: step.update(state, tasks), state, length=2)[0]

    found = block(step.init(theta)).meta_params
    chex.assert_trees_all_close(np.asarray(found), expected.meta_params, rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "on_host"),
    [
        (AxisType.Auto, False),
        pytest.param(AxisType.Explicit, False, marks=SLOW),
        pytest.param(AxisType.Explicit, True, marks=SLOW),
    ],
)
def test_warm_starts_are_sharded_as_the_parameters(kind, on_host):
    theta, tasks = theta_and_tasks(width=8)
    found = []
    for mesh in (None, mesh_of(2, 4, kind)):
        inner = mm.InnerLoop(optax.adam(0.01), steps=2)
        cold = mm.make_meta_step(
            make_problem(), inner, ESTIMATORS["implicit"], optax.sgd(0.1), task_chunk=1, mesh=mesh
        )
        step = mm.meta.WarmStart(cold, size=2, on_host=on_host and mesh is not None)
        state = step.init(theta if mesh is None else on(mesh, theta, tasks)[0], tasks)
        for _ in range(2):
            state, _ = step(state, tasks)
        found.append(state)
    alone, spread = found
    chex.assert_trees_all_close(
        np.asarray(spread.meta.meta_params), alone.meta.meta_params, rtol=1e-3, atol=1e-5
    )
    if not on_host:
        for leaf in (spread.memory.params, spread.memory.solution, spread.memory.solver[0].mu):
            assert leaf.addressable_shards[0].data.shape == (1, LAYERS, 2, 8)


def test_a_problem_may_say_how_its_parameters_are_sharded():
    """By the axis's name alone: φ₀ is no part of θ, so that nothing else says where it is."""

    def init(theta):
        return jax.lax.with_sharding_constraint(jnp.zeros((LAYERS, 8, 8)), ROWS)

    theta, tasks = theta_and_tasks(width=8)
    mesh = mesh_of(1, 8)
    step = make_step(mesh, problem=make_problem(init=init))
    state, _ = step(step.init(theta), tasks)  # θ itself is whole on every device
    alone = make_step(problem=make_problem(init=lambda theta: jnp.zeros((LAYERS, 8, 8))))
    expected, _ = alone(alone.init(theta), tasks)
    chex.assert_trees_all_close(state.meta_params, expected.meta_params, rtol=1e-4)


@pytest.mark.parametrize("estimator", ["implicit", pytest.param("unrolled", marks=SLOW)])
def test_policies_of_jax_checkpoint_choose_what_is_stored(estimator):
    theta, tasks = theta_and_tasks(width=8)
    tasks = jax.tree.map(lambda leaf: jnp.tile(leaf, (1, 32, 1)), tasks)
    found = {}
    for name in ("everything_saveable", "nothing_saveable"):
        step = make_step(estimator=estimator, problem=make_problem(getattr(POLICIES, name)))
        program, state = compiled(step, theta, tasks)
        memory = program.memory_analysis().temp_size_in_bytes
        found[name] = memory, program(state, tasks)[0].meta_params
    (stored, expected), (recomputed, gradient) = found.values()
    assert recomputed < 0.75 * stored
    chex.assert_trees_all_close(gradient, expected, rtol=1e-5)


def test_what_a_policy_offloads_is_placed_in_the_memory_of_the_host():
    """In a program for a GPU; a CPU (jax 0.10.2) takes the policy and keeps its one memory."""
    policy = POLICIES.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["product"],
        offload_src="device",
        offload_dst="pinned_host",
    )
    theta, tasks = theta_and_tasks(width=8)
    step = make_step(problem=make_problem(policy))
    state = step.init(theta)
    exported = jax.export.export(jax.jit(step.update), platforms=["cuda"])(state, tasks)
    assert "pinned_host" in exported.mlir_module()
    plain = make_step()
    expected, _ = plain(plain.init(theta), tasks)
    chex.assert_trees_all_close(step(state, tasks)[0].meta_params, expected.meta_params, rtol=1e-5)


def test_states_between_steps_wait_in_the_memory_of_the_host():
    """In a program for a GPU; on a CPU the numbers are those of "step"."""
    theta, tasks = theta_and_tasks(width=8)
    found = []
    for remat in ("step", "host"):
        inner = mm.InnerLoop(optax.sgd(0.1, momentum=0.9), steps=4)
        step = mm.make_meta_step(make_problem(), inner, H.unrolled(remat), optax.sgd(0.1))
        state = step.init(theta)
        exported = jax.export.export(jax.jit(step.update), platforms=["cuda"])(state, tasks)
        placed = [line for line in exported.mlir_module().splitlines() if "pinned_host" in line]
        assert bool(placed) == (remat == "host")
        found.append(step(state, tasks)[0].meta_params)
    chex.assert_trees_all_close(*found, rtol=1e-6)
