r"""SABA: SOBA with its variance reduced by stored gradients."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from memmeta import _checks
from memmeta.hypergradient import TaskGradient, report_of_loop
from memmeta.hypergradient._estimator import TaskStart, drawn
from memmeta.inner import InnerLoop
from memmeta.inner._views import View
from memmeta.meta import WarmStart
from memmeta.problem import Context, Problem, SplitContext
from memmeta.recipes._directions import Directions, directions, made, moved, stepped


class Stored(NamedTuple):
    """What SABA keeps beside φ.

    Attributes:
        v: the solution of the linear system so far.
        table: the last directions seen on each batch, every leaf [batches, ...].
        mean: their mean, in the whole context.
    """

    v: Any
    table: Directions
    mean: Directions


def saba(
    problem: Problem,
    optimizer: optax.GradientTransformation,
    *,
    rate: float,
    linear_rate: float,
    batches: int,
    view: View,
    size: int = 1,
) -> WarmStart:
    r"""SABA: `soba` with each direction corrected as in SAGA, so that fixed rates converge exactly.

    $$D \leftarrow D_i - D_i^{\text{stored}} + \frac1n \sum_j D_j^{\text{stored}}, \qquad
      D_i^{\text{stored}} \leftarrow D_i$$

    for D_φ, D_v and D_c, with batch i drawn uniformly. One number draws the batch of both losses
    where the paper draws two. Keeps n times the directions of a batch.

    Args:
        problem: the bilevel problem.
        optimizer: of θ, with its rate.
        rate: of φ.
        linear_rate: of v.
        batches: n, into how many batches the data are cut.
        view: (context, key, i) -> batch i, 0 ≤ i < n, the same each time, of the data of both
            losses; such as `memmeta.inner.step_by_step` where the data have an axis of batches.
        size: inner problems, a task each.

    Returns:
        The meta-step, to be called as `step(state, tasks)`.

    Raises:
        ValueError: a rate is not positive, or `batches` is no whole number above 0.

    Source: Dagréou, Ablin, Vaiter, Moreau (NeurIPS 2022), section 3.2; SAGA: Defazio, Bach,
    Lacoste-Julien (NeurIPS 2014).

    Example:
        >>> import memmeta as mm
        >>> problem = mm.Problem(
        ...     embed=lambda theta, targets: {"theta": theta, "targets": targets},
        ...     inner_loss=lambda phi, c: 0.5 * jnp.sum((phi - c["theta"]) ** 2),
        ...     outer_loss=lambda phi, c: (0.5 * jnp.sum((phi - c["targets"]) ** 2), {}),
        ...     init=jnp.zeros_like,
        ... )
        >>> view = mm.inner.step_by_step(of=lambda path: path == "targets")
        >>> step = saba(
        ...     problem, optax.sgd(0.05), rate=0.2, linear_rate=0.2, batches=2, view=view
        ... )
        >>> tasks = jnp.array([[[0.0], [4.0]]])
        >>> state = step.init(jnp.zeros(1), tasks)
        >>> for _ in range(600):
        ...     state, metrics = step(state, tasks)
        >>> state.meta.meta_params.round(3).tolist()
        [2.0]
    """
    _checks.positive("linear_rate", linear_rate)
    _checks.count("batches", batches)

    def rule(problem: Problem, inner: InnerLoop, begin: TaskStart) -> TaskGradient:
        state = inner.start(problem, begin.params, begin.context.whole, begin.earlier)
        draw = jax.random.fold_in(begin.key, state.steps)
        number = jax.random.randint(draw, (), 0, batches, jnp.int32)
        context, pull_back = drawn(view, begin.context, begin.key, number)
        stored = begin.guess
        stored = _nothing(begin, context, batches) if stored is None else stored
        new, outer = directions(problem, begin.params, stored.v, context)

        old = jax.tree.map(lambda leaf: leaf[number], stored.table)
        change = jax.tree.map(jnp.subtract, new, old)
        change = change._replace(context=pull_back(change.context))
        along = jax.tree.map(jnp.add, change, stored.mean)
        mean = jax.tree.map(lambda m, c: m + c / batches, stored.mean, change)
        table = jax.tree.map(lambda leaf, x: leaf.at[number].set(x), stored.table, new)

        state = stepped(problem, inner, state, along.params, begin)
        v = moved(stored.v, linear_rate, along.solution)
        kept, report = Stored(v, table, mean), report_of_loop(state)
        return TaskGradient(outer.loss, outer.aux, along.context, None, report, state, kept)

    return made(problem, rule, "saba", optimizer, rate=rate, steps=1, view=view, size=size)


def _nothing(begin: TaskStart, batch: SplitContext, batches: int) -> Stored:
    """Zero directions: the correction is unbiased whatever is stored."""

    def zeros(context: Context) -> Directions:
        found = Directions(begin.params, begin.params, context)
        blank: Directions = jax.tree.map(jnp.zeros_like, found)
        return blank

    of_batch = zeros(batch.active)
    table = jax.tree.map(lambda x: jnp.zeros((batches, *x.shape), x.dtype), of_batch)
    return Stored(of_batch.solution, table, zeros(begin.context.active))
