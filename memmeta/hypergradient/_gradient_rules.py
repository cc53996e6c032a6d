r"""Problems whose inner gradient is differentiated by a rule of its own.

Reverse mode through an inner step needs, for a cotangent u of ∇_φ g, the two products
(∂²_φφ g u, ∂²_cφ g u). Left alone, JAX computes them reverse over reverse.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

import jax

from memmeta._shared import trees
from memmeta.problem import Context, Params, Problem, Scalar, SplitContext

Products: TypeAlias = Callable[
    [Callable[..., Any], Params, Context, Params], tuple[Params, Context]
]
"""(both gradients of g, φ, c, u) -> (∂²_φφ g u, ∂²_cφ g u)."""


def with_products(problem: Problem, context: SplitContext, products: Products) -> Problem:
    """The same problem, with its second derivatives by a rule.

    Any inner solver that takes gradients of `inner_loss` by `jax.grad` or `jax.value_and_grad`
    runs on it unchanged.

    Args:
        problem: the problem.
        context: of the task; derivatives by its passive leaves are not made.
        products: the rule.

    Returns:
        The problem with another `inner_loss` of the same values and gradients.
    """

    active_leaves = trees.merge(
        jax.tree.map(lambda _: True, context.active), jax.tree.map(lambda _: False, context.passive)
    )

    def inner_loss(params: Params, context: Context) -> Scalar:
        active, passive = trees.split(context, active_leaves)
        loss = lambda params, active: problem.inner_loss(params, trees.merge(active, passive))  # noqa: E731
        pure, values = trees.hoisted(loss, params, active)
        return _ruled(pure, products)(values, params, active)

    return replace(problem, inner_loss=inner_loss)


def _ruled(loss: Callable[..., Scalar], products: Products) -> Callable[..., Scalar]:
    """loss(values, φ, c) with the gradient as usual and the gradient's gradient by the rule."""
    # Two rules: `ruled` gives the usual gradient by calling `gradient`, whose own rule gives the
    # second derivatives. The values are hoisted because custom_vjp (jax 0.10.2) cannot close over
    # traced ones; they are constants of the task here, so their cotangent is None.
    both = jax.grad(loss, argnums=(1, 2))

    @jax.custom_vjp
    def gradient(values: list[Any], params: Params, context: Context) -> Params:
        return both(values, params, context)[0]

    def gradient_forward(*arguments: Any) -> tuple[Params, tuple[Any, ...]]:
        return gradient(*arguments), arguments

    def gradient_backward(arguments: tuple[Any, ...], u: Params) -> tuple[None, Params, Context]:
        values, params, context = arguments
        return None, *products(partial(both, values), params, context, u)

    gradient.defvjp(gradient_forward, gradient_backward)

    @jax.custom_vjp
    def ruled(values: list[Any], params: Params, context: Context) -> Scalar:
        return loss(values, params, context)

    def forward(*arguments: Any) -> tuple[Scalar, tuple[Any, ...]]:
        return ruled(*arguments), arguments

    def backward(arguments: tuple[Any, ...], scale: Scalar) -> tuple[None, Params, Context]:
        slopes = gradient(*arguments), both(*arguments)[1]
        return None, *jax.tree.map(lambda slope: scale.astype(slope.dtype) * slope, slopes)

    ruled.defvjp(forward, backward)
    return ruled
