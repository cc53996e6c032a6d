"""What changes from one meta-step to the next: a memory of the tasks, and the estimator itself."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxtyping import Array, Int32

from memmeta.problem import Batch, Params


class Memory(NamedTuple):
    """What a warm-started estimator keeps of a task from one meta-step to the next.

    Attributes:
        params: φ̂_i, where the next inner loop starts.
        solution: v̂_i, where the next linear solve starts.
    """

    params: Params
    solution: Params


class Warm(NamedTuple):
    """A batch of tasks with what is remembered of each; estimators that can, start from it.

    Attributes:
        tasks: the tasks, every leaf with a leading axis of tasks.
        memory: of the same tasks, every leaf with the same leading axis.
    """

    tasks: Batch
    memory: Memory


@dataclass(frozen=True)
class Scheduled:
    """An estimator that changes from one outer iteration to the next.

    Attributes:
        at: step (a traced int32) -> the estimator of that meta-step.

    Example:
        >>> import memmeta as mm
        >>> tightening = mm.hypergradient.Scheduled(
        ...     lambda step: mm.hypergradient.implicit(tolerance=1 / (1.0 + step) ** 2)
        ... )
    """

    at: Callable[[Int32[Array, ""]], Any]


def unpacked(batch: Batch, name: str, remembers: bool) -> tuple[Batch, Memory | None]:
    """The tasks of a batch, and their memory where it is `Warm`.

    Raises:
        ValueError: it is, but the estimator called `name` keeps nothing.
    """
    if not isinstance(batch, Warm):
        return batch, None
    if not remembers:
        raise ValueError(
            f"{name}: found a batch with a memory of its tasks (memmeta.warm_start), expected "
            "plain tasks: this estimator starts every task from φ₀. Use implicit()."
        )
    return batch.tasks, batch.memory
