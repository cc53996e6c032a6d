r"""The Hessian of the inner loss by its products with vectors."""

from collections.abc import Callable

import jax

from memmeta.problem import Context, Params, Problem


def hessian_product(
    problem: Problem, params: Params, context: Context
) -> tuple[Params, Callable[[Params], Params]]:
    r"""∇_φ g and u ↦ ∂²_φφ g u at φ, forward over reverse.

    Each product computes the gradient's intermediate values anew: what is kept between products is
    φ alone, and a product takes the memory of little more than two gradients. Kept, as
    `jax.linearize` keeps them, they take twice that and save a twentieth of the time or nothing.

    Args:
        problem: its inner loss is used.
        params: φ.
        context: of one task.

    Returns:
        The gradient, and the product.

    Source: Pearlmutter (1994).

    Example:
        >>> import jax.numpy as jnp
        >>> g = Problem(
        ...     embed=lambda theta, batch: batch,
        ...     inner_loss=lambda phi, c: jnp.sum(c * phi**2) / 2,
        ...     outer_loss=lambda phi, c: (jnp.sum(phi), {}),
        ...     init=lambda theta: theta,
        ... )
        >>> gradient, product = hessian_product(g, jnp.ones(2), jnp.array([1.0, 5.0]))
        >>> gradient.tolist(), product(jnp.ones(2)).tolist()
        ([1.0, 5.0], [1.0, 5.0])
    """

    @jax.checkpoint
    def slope(params: Params) -> Params:
        return jax.grad(problem.inner_loss)(params, context)

    return jax.linearize(slope, params)
