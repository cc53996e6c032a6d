"""The devices of a run: how many a CPU counts as, the mesh of devices, and their memory."""

import contextlib
import os
from pathlib import Path

import jax
from jax.sharding import Mesh

from memmeta.meta import task_mesh


def use(count: int | None) -> None:
    """Make the CPU count as several devices; must be called before JAX initialises its devices.

    Args:
        count: how many devices; None leaves the number as it is.
    """
    # On a slow or suspended machine a device may wait for the others' sums longer than XLA's
    # default timeout, after which the process would end.
    patience = "--xla_cpu_collective_call_terminate_timeout_seconds=1000000"
    if "xla_cpu_collective" not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {patience}".strip()
    if count is not None:
        with contextlib.suppress(RuntimeError):  # JAX has its devices already: `chosen` reports it
            jax.config.update("jax_num_cpu_devices", count)


def cores() -> int | None:
    """The number of CPU cores this process may use; None if XLA_FLAGS set the device count."""
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return None
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def chosen(count: int | None, tasks: int) -> Mesh | None:
    """The mesh of devices that a run's tasks are spread over.

    Args:
        count: devices in each process. None: in a single process the largest number of devices that
            divides `tasks`; in several processes all devices.
        tasks: tasks in a meta-step.

    Returns:
        The mesh; None for one device.

    Raises:
        ValueError: there are fewer devices than `count`, or their number does not divide `tasks`.
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
    """The bytes a program needs on each device, by the compiler's count; None if it has none."""
    memory = compiled.memory_analysis()
    if memory is None:
        return None
    sizes = ("temp_size_in_bytes", "argument_size_in_bytes", "output_size_in_bytes")
    needed = sum(getattr(memory, name) for name in sizes) - memory.alias_size_in_bytes
    return int(needed)


def free_bytes() -> int | None:
    """The total memory of one device, or of the machine if devices are CPUs; None if unknown."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in statistics:
        return int(statistics["bytes_limit"])
    if jax.default_backend() != "cpu":
        return None
    limits: list[int] = []
    with contextlib.suppress(OSError, ValueError, AttributeError):
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with contextlib.suppress(OSError, ValueError):  # the limit of a container
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(limits, default=None)
