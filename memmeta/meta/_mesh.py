"""The mesh of devices that tasks are spread over, and what each device works on."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, PyTree

TASKS = "tasks"
"""The name of the mesh axis that tasks are spread over."""


def task_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of one axis, `TASKS`.

    Args:
        devices: default all of them, of all processes.

    Returns:
        The mesh.

    Example:
        >>> task_mesh(jax.devices()[:1]).shape[TASKS]
        1
    """
    return Mesh(np.array(jax.devices() if devices is None else devices), (TASKS,))


def mesh_of_tasks(mesh: Mesh | None) -> Mesh | None:
    """A mesh with an axis of tasks, as it is given.

    Raises:
        ValueError: it is no mesh, or has no axis called "tasks".
    """
    if mesh is None:
        return None
    if not isinstance(mesh, Mesh) or TASKS not in mesh.axis_names:
        found = mesh.axis_names if isinstance(mesh, Mesh) else mesh
        raise ValueError(
            f"mesh: expected a jax.sharding.Mesh with an axis named {TASKS!r}, found {found!r}. "
            "memmeta.meta.task_mesh() makes one of all devices."
        )
    return mesh


def automatic(mesh: Mesh) -> Mesh:
    """The same devices with all axes Auto: the compiler, not the types, says what is where."""
    return Mesh(mesh.devices, mesh.axis_names)


def untyped(mesh: Mesh | None) -> AbstractContextManager[Any]:
    """Inside, arrays on the `automatic` mesh can be worked on, whatever mesh the caller has set.

    A user's functions may then write `with_sharding_constraint(x, P("model"))` by name alone.
    """
    if mesh is None:
        return nullcontext()
    return jax.sharding.use_abstract_mesh(automatic(mesh).abstract_mesh)


def without_types(mesh: Mesh | None, function: Callable[..., Any], out: Any) -> Callable[..., Any]:
    """Run a function with the shardings of its arguments' types set aside, and `out` given back.

    On a mesh with axes of type Explicit (the default of `jax.make_mesh`) each array's type says how
    it is sharded, and JAX refuses what does not say how its result is: reshapes, gathers and most
    of a user's losses. Inside, the same layouts are the compiler's.

    Args:
        mesh: from `mesh_of_tasks`; one without such axes runs the function as it is.
        function: of arrays.
        out: a `PartitionSpec` for each output, or each subtree.
    """
    there = jax.sharding.get_abstract_mesh()
    inside = not there.empty and AxisType.Explicit not in there.axis_types
    if mesh is None or AxisType.Explicit not in mesh.axis_types or inside:
        return function
    is_spec = lambda leaf: isinstance(leaf, P)  # noqa: E731
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), out, is_leaf=is_spec)
    found: Callable[..., Any] = jax.sharding.auto_axes(function, out_sharding=shardings)
    return found


def specs(tree: PyTree) -> PyTree:
    """How each array is sharded, by its type: P() on a mesh without Explicit axes."""
    return jax.tree.map(lambda leaf: jax.typeof(leaf).sharding.spec, tree)


def shards(mesh: Mesh | None) -> int:
    """Over how many devices tasks are spread."""
    return 1 if mesh is None else mesh.shape[TASKS]


def spread(
    mesh: Mesh | None, function: Callable[..., Any], split: int, out: Any
) -> Callable[..., Any]:
    """Run a function on every device, the last `split` arguments cut along their leading axis.

    Args:
        mesh: from `mesh_of_tasks`; None runs it as it is.
        function: sees the cut arguments' share of its device, the others whole.
        split: how many of its last arguments are cut.
        out: for each output, or each subtree, whether it is joined along its leading axis (True) or
            is the same on every device (False).

    Returns:
        The function of whole arguments and outputs.
    """
    if mesh is None:
        return function
    out_specs = jax.tree.map(lambda joined: P(TASKS) if joined else P(), out)

    def spread_out(*arguments: Any) -> Any:
        whole = len(arguments) - split
        # Not `check_vma` (jax 0.10.2): a loop of the user's that starts from a fresh zero would be
        # refused, and a derivative by the parameters would be summed over devices for every chunk.
        return jax.shard_map(
            function,
            mesh=automatic(mesh),
            in_specs=(P(),) * whole + (P(TASKS),) * split,
            out_specs=out_specs,
            axis_names={TASKS},
            check_vma=False,
        )(*arguments)

    return spread_out


def draw(mesh: Mesh | None, sample: Callable[..., Any], count: int) -> Callable[..., PyTree]:
    """Draw each task on the device that will use it, the same whatever the number of devices.

    Args:
        mesh: from `mesh_of_tasks`.
        sample: (*arguments, number, first) -> tasks `first` to `first + number - 1`.
        count: tasks in all, a multiple of `shards(mesh)`.

    Returns:
        A function of the arguments and `first` that returns `count` tasks from number `first` on,
        spread over the devices.
    """
    local = count // shards(mesh)
    share = spread(mesh, lambda *args: sample(*args[:-1], local, args[-1][0]), 1, True)
    return lambda *arguments: share(
        *arguments[:-1], arguments[-1] + jnp.arange(count, dtype=jnp.int32)
    )


def place(mesh: Mesh | None, tree: PyTree, spec: P = P()) -> PyTree:
    """Put a tree's arrays on all devices of a mesh; what is sharded over them already stays so.

    Args:
        mesh: None leaves the tree as it is.
        tree: arrays; with several processes the same in each.
        spec: how to shard those that are not yet; default a copy on every device.
    """
    if mesh is None:
        return tree

    def one(leaf: Any) -> Array:
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and sharding.mesh.axis_names == mesh.axis_names:
            return put(leaf, NamedSharding(mesh, sharding.spec))
        return put(leaf, NamedSharding(mesh, spec))

    return jax.tree.map(one, tree)


def put(leaf: Any, sharding: NamedSharding) -> Array:
    """`jax.device_put`, of what several processes have alike too."""
    if sharding.is_fully_addressable or not getattr(leaf, "is_fully_addressable", True):
        moved: Array = jax.device_put(leaf, sharding)
        return moved
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = put(jax.random.key_data(leaf), sharding)
        keys: Array = jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        return keys
    # some of the devices are other processes': each process brings its own devices' part
    whole = np.asarray(leaf)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])
