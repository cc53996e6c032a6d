"""What a meta-step reports: per task, averaged, and how often something was wrong."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, PyTree

from memmeta import trees
from memmeta.hypergradient import Report
from memmeta.problem import MetaParams, Scalar

STEEP = 1e4
"""An inner loop that ends where ‖∇_φ g‖ is larger than this has diverged."""


class Counts(NamedTuple):
    """Trouble met in a meta-step, as numbers of tasks; `refused` as a number of meta-steps.

    Attributes:
        masked: left out of every average, because something about them was not finite.
        diverging: inner loops of a step or more that ended on a slope steeper than `STEEP`.
        indefinite: tasks whose inner Hessian has a direction without positive curvature, so that φ̂
            is no strict minimum and the implicit function theorem does not hold.
        refused: updates that the guard refused: the meta-gradient was far longer than this run's
            gradients are, or what was to be stored was not finite.
    """

    masked: Int32[Array, ""]
    diverging: Int32[Array, ""]
    indefinite: Int32[Array, ""]
    refused: Int32[Array, ""]


class TaskMetrics(NamedTuple):
    """The figures of every single task of a meta-step, each with a leading axis of tasks.

    Attributes:
        loss: f_i, the query loss.
        aux: auxiliary outputs of the outer loss.
        report: see `memmeta.hypergradient.Report`.
        usable: whether the task was finite and took part in the averages.
    """

    loss: Float[Array, " tasks"]
    aux: PyTree
    report: Report
    usable: Bool[Array, " tasks"]


class Metrics(NamedTuple):
    """What a meta-step reports. Averages are over the usable tasks.

    Attributes:
        loss: mean query loss.
        aux: mean auxiliary outputs.
        report: mean report; `smallest_curvature` is the minimum.
        gradient_norm: ‖(1/n) Σ_i ∇F_i‖.
        counts: see `Counts`.
        tasks: the same figures task by task (None once they have been averaged away).
    """

    loss: Scalar
    aux: PyTree
    report: Report
    gradient_norm: Scalar
    counts: Counts
    tasks: TaskMetrics | None


class Sums(NamedTuple):
    """What one device adds up over its tasks: the one message of a meta-step.

    Attributes:
        gradient: Σ_i ∇F_i, in float32 at least.
        used: usable tasks.
        loss: Σ_i f_i.
        aux: sums of the auxiliary outputs.
        report: sums of the reports.
        smallest: [devices] the smallest curvature on each device, zero in the others' places, so
            that a sum over devices brings the minimum along; None where no curvature was met.
        counts: the numbers of `Counts`, without `refused`.
    """

    gradient: MetaParams
    used: Scalar
    loss: Scalar
    aux: PyTree
    report: Report
    smallest: Float[Array, " devices"] | None
    counts: tuple[Scalar, Scalar, Scalar]


def sums(gradient: MetaParams, tasks: TaskMetrics, device: Array, devices: int) -> Sums:
    """Add up what one device found.

    Args:
        gradient: Σ_i ∇F_i over the device's tasks.
        tasks: the device's tasks.
        device: which one this is.
        devices: how many there are.

    Returns:
        The sums.
    """

    def shown(leaf: Array, blank: float) -> Array:
        return jnp.where(tasks.usable.reshape((-1,) + (1,) * (leaf.ndim - 1)), leaf, blank)

    def total(leaf: Array) -> Array:
        return jnp.sum(shown(leaf, 0).astype(_wide(leaf)), axis=0)

    def number(condition: Array) -> Array:
        # in the dtype of the losses: arrays of one dtype travel as one message
        return jnp.sum(condition).astype(_wide(tasks.loss))

    curvature, smallest = tasks.report.smallest_curvature, None
    steep = (tasks.report.inner_steps > 0) & ~(tasks.report.inner_gradient_norm <= STEEP)
    flat = jnp.zeros_like(tasks.usable)
    if curvature is not None:
        flat = tasks.usable & (curvature <= 0)
        own = jnp.arange(devices, dtype=device.dtype) == device
        smallest = jnp.where(own, jnp.min(shown(curvature, jnp.inf)), 0)
    return Sums(
        gradient=gradient,
        used=number(tasks.usable),
        loss=total(tasks.loss),
        aux=jax.tree.map(total, tasks.aux),
        report=jax.tree.map(total, tasks.report),
        smallest=smallest,
        counts=(
            number(~tasks.usable),
            number(tasks.usable & steep),
            number(flat),
        ),
    )


def averages(summed: Sums, gradient: MetaParams, tasks: TaskMetrics) -> Metrics:
    """The metrics of a meta-step from the sums over all devices.

    Args:
        summed: added up over the devices.
        gradient: the mean hypergradient.
        tasks: the figures task by task.

    Returns:
        The metrics; `counts.refused` is still zero.
    """
    used = jnp.maximum(summed.used, 1)
    loss, aux, report = jax.tree.map(
        lambda leaf: leaf / used.astype(leaf.dtype), (summed.loss, summed.aux, summed.report)
    )
    counts = [number.astype(jnp.int32) for number in summed.counts]
    if summed.smallest is not None:
        report = report._replace(smallest_curvature=jnp.min(summed.smallest))
    return Metrics(
        loss=loss,
        aux=aux,
        report=report,
        gradient_norm=trees.norm(gradient),
        counts=Counts(*counts, refused=jnp.int32(0)),
        tasks=tasks,
    )


def _wide(leaf: Array) -> Any:
    return trees.accumulator(leaf.dtype) if trees.is_inexact(leaf) else jnp.float32
