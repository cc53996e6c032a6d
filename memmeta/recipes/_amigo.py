r"""AmIGO: a few stochastic steps of φ and of v, each from where the last meta-step ended."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from memmeta._shared import checks
from memmeta.hypergradient import TaskGradient, report_of_loop
from memmeta.hypergradient._estimator import TaskStart, drawn
from memmeta.inner import InnerLoop
from memmeta.inner._views import View
from memmeta.meta import WarmStart
from memmeta.problem import Params, Problem, hessian_product, products
from memmeta.recipes._directions import OUTER, made, moved, outer_at

LINEAR = 2**31 - 4
"""What keeps the draws of the linear steps apart from those of φ."""


def amigo(
    problem: Problem,
    optimizer: optax.GradientTransformation,
    *,
    rate: float,
    linear_rate: float,
    steps: int,
    linear_steps: int,
    view: View | None = None,
    size: int = 1,
) -> WarmStart:
    r"""AmIGO: warm starts of both inner problems.

    K times $\phi \leftarrow \phi - \rho \nabla_\phi g$, then with b = ∂_φ f(φ) M times
    $v \leftarrow v - \eta \, (\partial^2_{\phi\phi} g \, v - b)$, then θ along
    $\partial_\theta f - \partial^2_{\theta\phi} g \, v$. Each step of φ and of v has a draw of its
    own, b and the last line share one.

    Arguments that are not listed are those of `soba`, and so is what it returns.

    Args:
        rate: ρ.
        linear_rate: η.
        steps: K.
        linear_steps: M.

    Raises:
        ValueError: a rate is not positive, or a number of steps is no whole number above 0.

    Source: Arbel and Mairal, "Amortized Implicit Differentiation for Stochastic Bilevel
    Optimization" (ICLR 2022), Algorithms 1 to 3.

    Example:
        >>> import optax
        >>> def make(problem, view):
        ...     rates = {"rate": 0.1, "linear_rate": 0.1}
        ...     counts = {"steps": 10, "linear_steps": 10}
        ...     return amigo(problem, optax.sgd(0.01), **rates, **counts, view=view)
    """
    checks.positive("linear_rate", linear_rate)
    checks.count("steps", steps)
    checks.count("linear_steps", linear_steps)

    def rule(problem: Problem, inner: InnerLoop, begin: TaskStart) -> TaskGradient:
        whole, phi, v = begin.context, begin.params, begin.guess
        state = inner.run(problem, phi, whole.whole, begin.key, begin.earlier)
        phi = state.params
        v = jax.tree.map(jnp.zeros_like, phi) if v is None else v
        before = state.before // steps  # meta-steps of this life
        key = jax.random.fold_in(begin.key, OUTER)
        context, pull_back = drawn(view, whole, key, before)
        outer = outer_at(problem, phi, context)

        def linear_step(v: Params, count: Array) -> tuple[Params, None]:
            key = jax.random.fold_in(begin.key, LINEAR)
            seen, _ = drawn(view, whole, key, before * linear_steps + count)
            _, product = hessian_product(problem, phi, seen.whole)
            return moved(v, linear_rate, jax.tree.map(jnp.subtract, product(v), outer.params)), None

        v, _ = jax.lax.scan(linear_step, v, jnp.arange(linear_steps, dtype=jnp.int32))
        mixed = products(problem, phi, v, context).mixed
        context_bar = pull_back(jax.tree.map(jnp.subtract, outer.context, mixed))
        report = report_of_loop(state)
        return TaskGradient(outer.loss, outer.aux, context_bar, None, report, state, v)

    return made(problem, rule, "amigo", optimizer, rate=rate, steps=steps, view=view, size=size)
