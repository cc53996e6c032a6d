r"""SOBA and MA-SOBA: one step of φ, v and θ each, all from the same point and the same draw."""

import jax
import jax.numpy as jnp
import optax

from memmeta._shared import checks
from memmeta.hypergradient import TaskGradient, report_of_loop
from memmeta.hypergradient._estimator import TaskStart, drawn
from memmeta.inner import InnerLoop
from memmeta.inner._views import View
from memmeta.meta import WarmStart
from memmeta.problem import Problem
from memmeta.recipes._directions import directions, made, moved, stepped


def soba(
    problem: Problem,
    optimizer: optax.GradientTransformation,
    *,
    rate: float,
    linear_rate: float,
    view: View | None = None,
    size: int = 1,
) -> WarmStart:
    r"""SOBA: a single loop, in which φ, v and θ move at once.

    $$\phi \leftarrow \phi - \rho \nabla_\phi g, \qquad
      v \leftarrow v - \eta \, (\partial^2_{\phi\phi} g \, v - \partial_\phi f), \qquad
      \theta \leftarrow \theta - \gamma \, (\partial_\theta f - \partial^2_{\theta\phi} g \, v)$$

    with all right-hand sides at the (φ, v, θ) before the step, on one draw of the data.

    Args:
        problem: the bilevel problem.
        optimizer: of θ, with its rate γ: `optax.sgd(γ)` is the paper's.
        rate: ρ.
        linear_rate: η.
        view: (context, key, step) -> what a step sees, of the data of both losses; None: all.
        size: inner problems, a task each.

    Returns:
        The meta-step, to be called as `step(state, tasks)`.

    Raises:
        ValueError: a rate is not positive.

    Source: Dagréou, Ablin, Vaiter, Moreau, "A Framework for Bilevel Optimization that Enables
    Stochastic and Global Variance Reduction Algorithms" (NeurIPS 2022), section 2.

    Example:
        >>> import memmeta as mm
        >>> problem = mm.Problem(
        ...     embed=lambda theta, target: (theta, target),
        ...     inner_loss=lambda phi, c: 0.5 * jnp.sum((phi - c[0]) ** 2),
        ...     outer_loss=lambda phi, c: (0.5 * jnp.sum((phi - c[1]) ** 2), {}),
        ...     init=jnp.zeros_like,
        ... )
        >>> step = soba(problem, optax.sgd(0.1), rate=0.5, linear_rate=0.5)
        >>> task = jnp.array([[1.0, 2.0]])
        >>> state = step.init(jnp.zeros(2), task)
        >>> for _ in range(100):
        ...     state, metrics = step(state, task)
        >>> state.meta.meta_params.round(2).tolist()
        [1.0, 2.0]
    """
    checks.positive("linear_rate", linear_rate)

    def rule(problem: Problem, inner: InnerLoop, begin: TaskStart) -> TaskGradient:
        state = inner.start(problem, begin.params, begin.context.whole, begin.earlier)
        phi, v = begin.params, begin.guess
        v = jax.tree.map(jnp.zeros_like, phi) if v is None else v
        context, pull_back = drawn(view, begin.context, begin.key, state.steps)
        found, outer = directions(problem, phi, v, context)
        state = stepped(problem, inner, state, found.params, begin)
        v = moved(v, linear_rate, found.solution)
        context_bar = pull_back(found.context)
        report = report_of_loop(state)
        return TaskGradient(outer.loss, outer.aux, context_bar, None, report, state, v)

    return made(problem, rule, "soba", optimizer, rate=rate, steps=1, view=view, size=size)


def ma_soba(
    problem: Problem,
    optimizer: optax.GradientTransformation,
    *,
    rate: float,
    linear_rate: float,
    average: float,
    view: View | None = None,
    size: int = 1,
) -> WarmStart:
    r"""MA-SOBA: `soba` along a moving average of its hypergradients.

    $$h \leftarrow (1 - \alpha) h + \alpha (\partial_\theta f - \partial^2_{\theta\phi} g \, v),
      \qquad \theta \leftarrow \theta - \gamma \, h$$

    Arguments that are not listed are those of `soba`, and so is what it returns.

    Args:
        optimizer: of θ, with its rate γ; it is given h.
        average: α, the weight of the newest hypergradient, above 0 and at most 1.

    Raises:
        ValueError: a rate is not positive, or `average` is not in (0, 1].

    Source: Chen, Xiao, Balasubramanian, "Optimal Algorithms for Stochastic Bilevel Optimization
    under Relaxed Smoothness Conditions" (JMLR 2024), Algorithm 1.

    Example:
        >>> from memmeta.inner import minibatch
        >>> def make(problem):
        ...     view = minibatch(64, of=lambda path: path in ("1/inputs", "1/targets"))
        ...     rates = {"rate": 0.1, "linear_rate": 0.1, "average": 0.1}
        ...     return ma_soba(problem, optax.sgd(0.01), **rates, view=view)
    """
    checks.positive("average", average)
    checks.require("average", average, average <= 1, "a weight of at most 1")
    averaged = optax.chain(optax.ema(1 - average, debias=False), optimizer)
    rates = {"rate": rate, "linear_rate": linear_rate}
    return soba(problem, averaged, **rates, view=view, size=size)
