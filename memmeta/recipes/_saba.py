r"""SABA: SOBA with its variance reduced by stored gradients."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, PyTree

from memmeta._shared import checks
from memmeta.hypergradient import TaskGradient, report_of_loop
from memmeta.hypergradient._estimator import TaskStart, drawn
from memmeta.hypergradient._seam import Row
from memmeta.inner import InnerLoop
from memmeta.inner._views import View
from memmeta.meta import WarmStart
from memmeta.problem import Params, Problem, SplitContext
from memmeta.recipes._directions import Directions, directions, made, moved, stepped


class Stored(NamedTuple):
    """What SABA keeps beside φ and the table of the last directions seen on each batch.

    Attributes:
        v: the solution of the linear system so far.
        mean: of the table, in the whole context.
    """

    v: Any
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

    Arguments that are not listed are those of `soba`, and so is what it returns.

    Args:
        batches: n, into how many batches the data are cut.
        view: (context, key, i) -> batch i, 0 ≤ i < n, the same each time, of the data of both
            losses; such as `memmeta.inner.step_by_step` where the data have an axis of batches.

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
    checks.positive("linear_rate", linear_rate)
    checks.count("batches", batches)

    def rule(problem: Problem, inner: InnerLoop, begin: TaskStart) -> TaskGradient:
        state = inner.start(problem, begin.params, begin.context.whole, begin.earlier)
        draw = jax.random.fold_in(begin.key, state.steps)
        number = jax.random.randint(draw, (), 0, batches, jnp.int32)
        context, pull_back = drawn(view, begin.context, begin.key, number)
        stored = begin.guess
        if stored is None:
            # Zero directions: the correction is unbiased whatever is stored.
            stored = Stored(_zeros(begin.params), _directions(begin.params, begin.context))
        empty = _empty(begin.params, context, batches)
        table = empty if begin.table is None else begin.table
        new, outer = directions(problem, begin.params, stored.v, context)
        old = _read(table, number, begun=state.steps > 0)
        change = jax.tree.map(jnp.subtract, new, old)
        change = change._replace(context=pull_back(change.context))
        along = jax.tree.map(jnp.add, change, stored.mean)
        mean = jax.tree.map(lambda m, c: m + c / batches, stored.mean, change)

        state = stepped(problem, inner, state, along.params, begin)
        v = moved(stored.v, linear_rate, along.solution)
        kept, report = Stored(v, mean), report_of_loop(state)
        row = empty if begin.table is None else Row(number, new, old)
        return TaskGradient(outer.loss, outer.aux, along.context, None, report, state, kept, row)

    return made(problem, rule, "saba", optimizer, rate=rate, steps=1, view=view, size=size)


def _directions(params: Params, context: SplitContext) -> Directions:
    """Zero directions."""
    zeros: Directions = _zeros(Directions(params, params, context.active))
    return zeros


def _empty(params: Params, batch: SplitContext, batches: int) -> Directions:
    """A table of zero directions on each batch."""
    one = _directions(params, batch)
    table: Directions = jax.tree.map(lambda x: jnp.zeros((batches, *x.shape), x.dtype), one)
    return table


def _read(table: Directions, number: Array, begun: Bool[Array, ""]) -> Directions:
    """What is stored so far: nothing in a life that has not begun.

    Read in a branch of its own. XLA (jax 0.10.2) would else read in each operation that uses it,
    some of them after the row is written, and copy the whole table for these.
    """

    def row(leaf: Array) -> Array:
        return leaf.at[number].get(mode="promise_in_bounds")

    def blank(leaf: Array) -> Array:
        return jnp.zeros(leaf.shape[1:], leaf.dtype)

    found: Directions = jax.lax.cond(
        begun, lambda: jax.tree.map(row, table), lambda: jax.tree.map(blank, table)
    )
    return found


def _zeros(tree: PyTree) -> Any:
    return jax.tree.map(jnp.zeros_like, tree)
