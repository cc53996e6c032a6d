"""What a meta-step reports, and the guard that decides from it whether an update is kept."""

import operator
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, PyTree

from memmeta._shared import checks, trees
from memmeta.hypergradient import Report
from memmeta.hypergradient._seam import Wanted
from memmeta.problem import MetaParams, Scalar

GREW = 10.0
"""An inner loop whose ‖∇_φ g‖ has grown by this factor or more diverges."""
LEFT = 0.1
"""An inner loop that keeps more than this share of ‖∇_φ g‖, or a linear solve that keeps more than
this share of its right-hand side, is too short for an implicit rule."""


KINDS = (
    "masked",
    "inputs",
    "inner_loop",
    "outer_loss",
    "hypergradient",
    "diverging",
    "unconverged",
    "unsolved",
    "unsound",
    "indefinite",
    "refused",
)
"""What is counted, see `Counts`."""
RESET = "reset"
"""What a population counts beside."""


@dataclass(frozen=True)
class Counts:
    """Trouble met in a meta-step, as numbers of tasks; `refused` as a number of meta-steps.

    Each is an attribute. Under `report="none"` all but `masked` and `refused` are None: not looked
    at.

    Attributes:
        masked: left out of every average, because something about them was not finite: the sum of
            the next four, each task being counted at the first of them that holds.
        inputs: of these, tasks whose own data are not finite.
        inner_loop: of these, tasks whose inner loop left the finite numbers.
        outer_loss: of these, tasks whose outer loss is not finite (as it is where a task has no
            example to adapt on or to evaluate on, or a label that no output stands for).
        hypergradient: of these, tasks of which only the hypergradient is not finite.
        diverging: inner loops of a step or more whose ‖∇_φ g‖ grew by the factor `GREW` or more.
        unconverged: tasks of an implicit rule whose inner loop left more than `LEFT` of its first
            ‖∇_φ g‖: the rule holds at a stationary point of the inner loss only.
        unsolved: tasks of an implicit rule whose linear solve left more than `LEFT` of its system.
        unsound: tasks whose linear solver says that its answer should not be used: a product that
            is not symmetric where it must be, a preconditioner that is not positive, a breakdown.
        indefinite: tasks whose inner Hessian has a direction without positive curvature, so that φ̂
            is no strict minimum and the implicit function theorem does not hold.
        refused: updates that the guard refused, because the meta-gradient was far larger than this
            run's usual ones or the next state was not finite.
        reset: members of a `WarmStart` that were set back to `init`, because φ, v or the outer loss
            was not finite; None outside of one.
        numbers: all of them as one array, its last axis in the order of `names`.
        names: of those that were looked at.
    """

    numbers: Int32[Array, "*meta_steps counts"]
    names: tuple[str, ...]

    def __getattr__(self, name: str) -> Any:
        if name not in (*KINDS, RESET):
            raise AttributeError(f"{type(self).__name__} has no {name!r}")
        # One array, cut up where it is read: ten outputs would be ten kernels to compile.
        return self.numbers[..., self.names.index(name)] if name in self.names else None

    def as_dict(self) -> dict[str, Int32[Array, "*meta_steps"]]:
        """Those that were looked at, by name, in their order."""
        return {name: self.numbers[..., place] for place, name in enumerate(self.names)}


def _of_leaves(names: tuple[str, ...], leaves: Iterable[Any]) -> Counts:
    # Not by the class itself, which would check a leaf that is a shape or a sharding as an array.
    made = object.__new__(Counts)
    (numbers,) = leaves
    object.__setattr__(made, "numbers", numbers)
    object.__setattr__(made, "names", names)
    return made


jax.tree_util.register_pytree_with_keys(
    Counts,
    lambda counts: (((jax.tree_util.GetAttrKey("numbers"), counts.numbers),), counts.names),
    _of_leaves,
)


class TaskMetrics(NamedTuple):
    """The figures of every single task of a meta-step, each with a leading axis of tasks.

    Attributes:
        loss: f_i, the query loss.
        aux: auxiliary outputs of the outer loss.
        report: see `memmeta.hypergradient.Report`.
        usable: whether the task was finite and took part in the averages.
        finite_inputs: whether the task's own data are finite.
    """

    loss: Float[Array, " tasks"]
    aux: PyTree
    report: Report
    usable: Bool[Array, " tasks"]
    finite_inputs: Bool[Array, " tasks"]


class Metrics(NamedTuple):
    """What a meta-step reports. Averages are over the usable tasks.

    Where no task is usable, averages are not-a-number and error figures infinite.

    Attributes:
        loss: mean query loss.
        aux: mean auxiliary outputs.
        report: mean report; `smallest_curvature` is the minimum.
        gradient_norm: ‖(1/n) Σ_i ∇F_i‖.
        used: tasks that took part.
        counts: see `Counts`.
        tasks: the same figures task by task, each with a leading axis of tasks: `loss`, `aux`,
            `report`, `usable` (whether the task took part in the averages) and `finite_inputs`
            (whether its own data are finite). None in means over several meta-steps.
    """

    loss: Scalar
    aux: PyTree
    report: Report
    gradient_norm: Scalar
    used: Int32[Array, ""]
    counts: Counts
    tasks: TaskMetrics | None


class Sums(NamedTuple):
    """What one device adds up over its tasks: the one message of a meta-step.

    Attributes:
        gradient: Σ_i ∇F_i, in float32 at least.
        aux: sums of the auxiliary outputs.
        figures: sums of the losses and of each figure of the reports, without `linear_status`.
        counts: usable tasks, and the numbers of `Counts` without `refused` and `reset`.
        smallest: [devices] the smallest curvature on each device, zero in the others' places, so
            that a sum over devices brings the minimum along; None where no curvature was met.
    """

    gradient: MetaParams
    aux: PyTree
    figures: Float[Array, " figures"]
    counts: Float[Array, " counts"]
    smallest: Float[Array, " devices"] | None


def report_of(report: Report, wanted: Wanted) -> Report:
    """A report without what is not wanted."""
    if not wanted.figures:
        return Report()
    return report if wanted.errors else report._replace(error_estimate=None, error_bound=None)


def sums(gradient: MetaParams, tasks: TaskMetrics, device: Array, devices: int) -> Sums:
    """Add up the figures of one device's tasks."""

    def total(leaf: Array) -> Array:
        usable = tasks.usable.reshape((-1,) + (1,) * (leaf.ndim - 1))
        return jnp.sum(jnp.where(usable, leaf, 0).astype(_wide(leaf)), axis=0)

    dtype = _wide(tasks.loss)
    figures = [leaf.astype(dtype) for leaf in jax.tree.leaves(_averaged(tasks))]
    met = [tasks.usable, ~tasks.usable, *_trouble(tasks)]
    # As bits of one number for each task: one pass makes it, and one pass adds all counts up.
    bits = reduce(operator.or_, [one.astype(jnp.int32) << place for place, one in enumerate(met)])
    counts = (bits[:, None] >> jnp.arange(len(met), dtype=jnp.int32)) & 1
    curvature, smallest = tasks.report.smallest_curvature, None
    if curvature is not None:
        own = jnp.arange(devices, dtype=device.dtype) == device
        smallest = jnp.where(own, jnp.min(jnp.where(tasks.usable, curvature, jnp.inf)), 0)
    return Sums(
        gradient=gradient,
        aux=jax.tree.map(total, tasks.aux),
        figures=total(jnp.stack(figures, axis=1)),
        # in the dtype of the losses: arrays of one dtype travel as one message
        counts=jnp.sum(counts, axis=0).astype(dtype),
        smallest=smallest,
    )


def _averaged(tasks: TaskMetrics) -> tuple[Array, Report]:
    """What has a mean over tasks; a status has none."""
    return tasks.loss, tasks.report._replace(linear_status=None)


def _trouble(tasks: TaskMetrics) -> list[Bool[Array, " tasks"]]:
    """Which tasks each of the `Counts` counts, in their order, without `masked` and `refused`."""
    report, usable = tasks.report, tasks.usable
    norm, reduction, steps = report[:3]
    if norm is None or reduction is None or steps is None:  # not asked for
        return []
    stepped = steps > 0
    found, causes = ~usable, []
    finite = (tasks.finite_inputs, ~stepped | jnp.isfinite(norm))
    for sound in (*finite, jnp.isfinite(tasks.loss)):
        causes.append(found & ~sound)
        found &= sound
    implicit = usable if report.linear_residual is not None else jnp.zeros_like(usable)
    residual = 0 if report.linear_residual is None else report.linear_residual
    status = 0 if report.linear_status is None else report.linear_status
    curvature = jnp.inf if report.smallest_curvature is None else report.smallest_curvature
    contraction = 0 if report.contraction is None else report.contraction
    grew = ~(reduction < GREW) | ~(jnp.asarray(contraction) < 1)
    return [  # `~(… < …)`: NaN counts as trouble
        *causes,
        found,
        usable & stepped & grew,
        implicit & ~(reduction <= LEFT),
        implicit & ~(jnp.asarray(residual) <= LEFT),
        implicit & (jnp.asarray(status) > 0),
        usable & (jnp.asarray(curvature) <= 0),
    ]


def averages(summed: Sums, gradient: MetaParams, tasks: TaskMetrics) -> Metrics:
    """The metrics of a meta-step from the sums over all devices; `counts.refused` is still zero."""
    used, nothing = summed.counts[0], summed.counts[0] == 0
    figures = jax.tree.structure(_averaged(tasks))
    # 0/0 where none is usable; divided before they are told apart, which would be a kernel for each
    means = jax.lax.optimization_barrier(summed.figures / used)
    loss, report = jax.tree.unflatten(figures, means)
    report = errors_infinite(nothing, report)
    if summed.smallest is not None:
        smallest = jnp.where(nothing, jnp.nan, jnp.min(summed.smallest))
        report = report._replace(smallest_curvature=smallest)
    counts = summed.counts.astype(jnp.int32)
    names = KINDS if counts.size == len(KINDS) else ("masked", "refused")
    return Metrics(
        loss=loss,
        aux=jax.tree.map(lambda leaf: leaf / used.astype(leaf.dtype), summed.aux),
        report=report,
        gradient_norm=jnp.where(nothing, jnp.nan, trees.norm(gradient)),
        used=counts[0],
        counts=Counts(jnp.pad(counts[1:], (0, 1)), names),
        tasks=tasks,
    )


def with_refused(metrics: Metrics, refused: Int32[Array, ""]) -> Metrics:
    """The metrics of a meta-step with `counts.refused`."""
    counts = metrics.counts
    return metrics._replace(counts=replace(counts, numbers=counts.numbers.at[-1].set(refused)))


def with_reset(metrics: Metrics, reset: Int32[Array, ""]) -> Metrics:
    """The metrics of a meta-step with `counts.reset`."""
    counts = metrics.counts
    numbers = jnp.append(counts.numbers, reset.astype(counts.numbers.dtype))
    return metrics._replace(counts=Counts(numbers, (*counts.names, RESET)))


def errors_infinite(nothing: Bool[Array, ""], report: Report) -> Report:
    """A mean report whose error figures are infinite where no task was usable."""
    errors = {"error_estimate": report.error_estimate, "error_bound": report.error_bound}
    return report._replace(**jax.tree.map(lambda error: jnp.where(nothing, jnp.inf, error), errors))


def _wide(leaf: Array) -> Any:
    return trees.accumulator(leaf.dtype) if trees.is_inexact(leaf) else jnp.float32


class Guard(NamedTuple):
    """Refuses updates: θ and the optimiser's state then stay as they are, and the step is counted.

    Make one by `guard`. `make_meta_step(..., guard=None)` follows every update whatever it is.

    Attributes:
        factor: a meta-gradient whose norm is more than this many times the running mean is refused.
    """

    factor: float

    def init(self, like: Float[Array, ""]) -> Float[Array, ""]:
        """The state before the first step: zero, no gradient has been seen."""
        return jnp.zeros_like(like)

    def accepts(
        self, usual: Float[Array, ""], gradient_norm: Float[Array, ""], proposed: PyTree
    ) -> tuple[Bool[Array, ""], Float[Array, ""]]:
        """Look at one update.

        Args:
            usual: the state: the geometric running mean of the meta-gradient's norm.
            gradient_norm: of this step; not a number where no task was usable.
            proposed: the next θ and optimiser's state.

        Returns:
            Whether to keep them, and the next state. Refused gradients of finite norm enter the
            mean too: should they stay large, they are accepted after some steps.
        """
        known = usual > 0
        near = gradient_norm <= jnp.where(known, self.factor * usual, jnp.inf)
        # Geometric mean with weight 1/8 on the newest, for three roots cost less than a power; of a
        # ratio, so that no product overflows.
        ratio = gradient_norm / jnp.where(known, usual, 1)
        moved = usual * jnp.sqrt(jnp.sqrt(jnp.sqrt(ratio)))
        following = jnp.where(known, moved, gradient_norm)
        enters = (gradient_norm > 0) & jnp.isfinite(following)
        return near & trees.all_finite(proposed), jnp.where(enters, following, usual)


def guard(factor: float = 1000.0) -> Guard:
    """A guard against updates that are not finite, or follow an unusually large gradient.

    Args:
        factor: more than this many times the running mean of ‖∇F‖ is unusual.

    Returns:
        The guard, for `make_meta_step`; its `factor` can be read.

    Raises:
        ValueError: `factor` is no finite number above 1.

    Example:
        >>> keep_all_but_nonsense = guard(factor=1e6)
    """
    checks.positive("factor", factor)
    checks.require("factor", factor, factor > 1, "a number above 1")
    return Guard(float(factor))


DEFAULT_GUARD = guard()
