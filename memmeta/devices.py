"""Devices: the mesh tasks are spread over, what a device works on, what it has room for."""

import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
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


def checked(mesh: Mesh | None) -> Mesh | None:
    """A mesh fit for `spread`: with an axis of tasks, all axes left to the compiler.

    Raises:
        ValueError: it is no mesh, or has no axis called "tasks".
    """
    if mesh is None:
        return None
    if not isinstance(mesh, Mesh) or TASKS not in mesh.axis_names:
        found = mesh.axis_names if isinstance(mesh, Mesh) else mesh
        raise ValueError(
            f"mesh: expected a jax.sharding.Mesh with an axis named {TASKS!r}, found {found!r}. "
            "memmeta.devices.task_mesh() makes one of all devices."
        )
    return Mesh(mesh.devices, mesh.axis_names)


def shards(mesh: Mesh | None) -> int:
    """Over how many devices tasks are spread."""
    return 1 if mesh is None else mesh.shape[TASKS]


def spread(mesh: Mesh | None, function: Callable, split: int, out: Any) -> Callable:
    """Run a function on every device, the last `split` arguments cut along their leading axis.

    Args:
        mesh: from `checked`; None runs it as it is.
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
        # Not `check_vma`: a loop of the user's that starts from a fresh zero would be refused, and
        # a derivative with respect to parameters would be summed over devices for every chunk.
        return jax.shard_map(
            function,
            mesh=mesh,
            in_specs=(P(),) * whole + (P(TASKS),) * split,
            out_specs=out_specs,
            axis_names={TASKS},
            check_vma=False,
        )(*arguments)

    return spread_out


def draw(mesh: Mesh | None, sample: Callable, count: int) -> Callable[..., PyTree]:
    """Draw a batch where it will be used, the same whatever the number of devices.

    Args:
        mesh: from `checked`.
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
        spec: how to shard the others; default a copy on every device.
    """
    if mesh is None:
        return tree

    def one(leaf: Array) -> Array:
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and sharding.mesh.axis_names == mesh.axis_names:
            return _put(leaf, NamedSharding(mesh, sharding.spec))
        return _put(leaf, NamedSharding(mesh, spec))

    return jax.tree.map(one, tree)


def _put(leaf: Array, sharding: NamedSharding) -> Array:
    if sharding.is_fully_addressable or not getattr(leaf, "is_fully_addressable", True):
        return jax.device_put(leaf, sharding)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = _put(jax.random.key_data(leaf), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    # some of the devices are other processes': each process brings its own devices' part
    whole = np.asarray(leaf)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def use(count: int | None) -> None:
    """Make the CPU several devices; before anything else asks JAX for one.

    Args:
        count: how many; None leaves it as it is.
    """
    # A device that waits for the others' sums must not give up on a slow or suspended machine.
    patience = "--xla_cpu_collective_call_terminate_timeout_seconds=1000000"
    if "xla_cpu_collective" not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {patience}".strip()
    if count is not None:
        with contextlib.suppress(RuntimeError):  # JAX has its devices already: `chosen` will see
            jax.config.update("jax_num_cpu_devices", count)


def cores() -> int | None:
    """CPU cores this process may use; None where the user's XLA_FLAGS say how many devices."""
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return None
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def chosen(count: int | None, tasks: int) -> Mesh | None:
    """The mesh a run's tasks are spread over.

    Args:
        count: devices in each process; None takes as many as there are and share out the tasks
            evenly.
        tasks: in a meta-step.

    Returns:
        The mesh; None for one device.

    Raises:
        ValueError: there are fewer devices, or they cannot share the tasks out evenly.
    """
    local, several = jax.local_device_count(), jax.process_count()
    if count is not None and not 1 <= count <= local:
        raise ValueError(f"devices: expected at most the {local} there are, found {count}")
    if several > 1:
        found = [d for p in range(several) for d in _of_process(p)[:count]]
    elif count is None:
        even = max(n for n in range(1, local + 1) if tasks % n == 0)
        found = jax.devices()[:even]
    else:
        found = jax.devices()[:count]
    if tasks % len(found):
        raise ValueError(
            f"tasks: expected a multiple of the {len(found)} devices they are spread over, "
            f"found {tasks}; change --tasks or --devices"
        )
    return task_mesh(found) if len(found) > 1 else None


def _of_process(number: int) -> list[jax.Device]:
    return [device for device in jax.devices() if device.process_index == number]


def needed_bytes(compiled: jax.stages.Compiled) -> int | None:
    """What a program needs on each device, from the compiler; None where it does not tell."""
    memory = compiled.memory_analysis()
    if memory is None:
        return None
    sizes = ("temp_size_in_bytes", "argument_size_in_bytes", "output_size_in_bytes")
    needed = sum(getattr(memory, name) for name in sizes) - memory.alias_size_in_bytes
    return int(needed)


def free_bytes() -> int | None:
    """What one device has to give, or of a CPU all of them together; None where it is not known."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in statistics:
        return int(statistics["bytes_limit"])
    if jax.default_backend() != "cpu":
        return None
    limits: list[int] = []
    with contextlib.suppress(OSError, ValueError, AttributeError):
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with contextlib.suppress(OSError, ValueError):  # of a container
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(limits, default=None)
