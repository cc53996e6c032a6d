"""The meta-steps between two log points, run as one program or, for host data, one per step."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Int32

from memmeta._shared.trees import is_inexact
from memmeta.data import Dataset, HostDataset
from memmeta.meta import MetaState, MetaStep, Metrics
from memmeta.meta._metrics import errors_infinite
from memmeta.problem import Batch


@dataclass(frozen=True)
class Block:
    """A function that makes several meta-steps and averages their metrics.

    The buffers of the state passed in are donated: that state cannot be used afterwards.

    Attributes:
        run: function from (state, train split, count) to (state, mean metrics).
        program: the compiled program, whose `memory_analysis()` says how much memory it needs.
    """

    run: Callable[..., tuple[MetaState, Metrics]]
    program: jax.stages.Compiled

    def __call__(
        self, state: MetaState, dataset: Dataset | HostDataset, count: int
    ) -> tuple[MetaState, Metrics]:
        """Make `count` meta-steps; returns the new state and the mean metrics."""
        return self.run(state, dataset, jnp.int32(count))


def on_device(
    step: MetaStep,
    batch: Callable[[MetaState, Dataset], Batch],
    state: MetaState,
    dataset: Dataset,
    everywhere: NamedSharding | None,
) -> Block:
    """A block that is one compiled program, which also draws the tasks.

    The count is traced, so that the last block, which may be shorter, needs no compilation of its
    own.

    Args:
        step: the function that makes one meta-step.
        batch: function from (state, split) to the tasks of the next meta-step.
        state: any state of the run; only its shapes and dtypes matter.
        dataset: the train split.
        everywhere: the sharding that copies the state to every device; None on one device.
    """

    @jax.jit  # so that the shapes and the loop below share one trace
    def one_step(state: MetaState, dataset: Dataset) -> tuple[MetaState, Metrics]:
        state, metrics = step.update(state, batch(state, dataset))
        return state, metrics._replace(tasks=None)

    @partial(jax.jit, donate_argnums=0, out_shardings=everywhere)
    def block(
        state: MetaState, dataset: Dataset, count: Int32[Array, ""]
    ) -> tuple[MetaState, Metrics]:
        def body(_: Array, carry: tuple[MetaState, Metrics]) -> tuple[MetaState, Metrics]:
            state, total = carry
            state, found = one_step(state, dataset)
            return state, _sum(total, found)

        start = _nothing(jax.eval_shape(one_step, state, dataset)[1])
        state, total = jax.lax.fori_loop(0, count, body, (state, start))
        return state, _means(total)

    program = block.lower(state, dataset, jnp.int32(1)).compile()
    return Block(program, program)


def on_host(
    step: MetaStep,
    batches: Callable[[MetaState, HostDataset, int], Iterator[Batch]],
    state: MetaState,
    batch: Batch,
    everywhere: NamedSharding | None,
) -> Block:
    """A block that calls a program for each meta-step, while the host gathers the next tasks.

    Args:
        step: the function that makes one meta-step.
        batches: function from (state, split, count) to the tasks of the next `count` meta-steps.
        state: any state of the run; only its shapes and dtypes matter.
        batch: the tasks of any meta-step; only their shapes and dtypes matter.
        everywhere: the sharding that copies the state to every device; None on one device.
    """

    @partial(jax.jit, donate_argnums=(0, 1), out_shardings=everywhere)
    def one_step(state: MetaState, total: Metrics, batch: Batch) -> tuple[MetaState, Metrics]:
        state, found = step.update(state, batch)
        return state, _sum(total, found._replace(tasks=None))

    shapes = jax.eval_shape(step.update, state, batch)[1]._replace(tasks=None)
    nothing = jax.jit(partial(_nothing, shapes), out_shardings=everywhere)
    means = jax.jit(_means, out_shardings=everywhere)
    program = one_step.lower(state, nothing(), batch).compile()

    def block(
        state: MetaState, dataset: HostDataset, count: Int32[Array, ""]
    ) -> tuple[MetaState, Metrics]:
        total = nothing()
        for batch in batches(state, dataset, int(count)):
            state, total = program(state, total, batch)
        return state, means(total)

    return Block(block, program)


def _nothing(shapes: Metrics) -> Metrics:
    """The value to start a sum of metrics from: zeros, and infinity as smallest curvature."""
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return _with_smallest(zeros, lambda curvature: jnp.full_like(curvature, jnp.inf), zeros)


def _sum(total: Metrics, found: Metrics) -> Metrics:
    """Add the metrics of one meta-step to a total.

    Averages are weighted by the number of tasks used, and the smallest curvature is the minimum.
    """
    some = found.used > 0

    def weigh(average: Array) -> Array:
        return jnp.where(some, average * found.used.astype(average.dtype), 0)

    weighed = jax.tree.map(lambda x: weigh(x) if is_inexact(x) else x, found)
    smallest = lambda a, b: jnp.where(some, jnp.minimum(a, b), a)  # noqa: E731
    return _with_smallest(jax.tree.map(jnp.add, total, weighed), smallest, total, found)


def _means(total: Metrics) -> Metrics:
    """Turn a total into averages over all tasks used; counts stay sums."""
    nothing = total.used == 0
    means = jax.tree.map(lambda x: x / total.used.astype(x.dtype) if is_inexact(x) else x, total)
    unknown = lambda curvature: jnp.where(nothing, jnp.nan, curvature)  # noqa: E731
    means = _with_smallest(means, unknown, total)
    return means._replace(report=errors_infinite(nothing, means.report))


def _with_smallest(metrics: Metrics, combine: Callable[..., Array], *parts: Metrics) -> Metrics:
    """Set the smallest curvature to `combine` of that of the parts, if the metrics have one."""
    if metrics.report.smallest_curvature is None:
        return metrics
    smallest = combine(*(part.report.smallest_curvature for part in parts))
    return metrics._replace(report=metrics.report._replace(smallest_curvature=smallest))
