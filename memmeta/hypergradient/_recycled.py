r"""Where a linear solve starts, from the solutions of the meta-steps before."""

from typing import Any

import jax
import jax.numpy as jnp

from memmeta._shared import trees
from memmeta.linear_solve._solution import Product, Vector


def combined(product: Product, b: Vector, earlier: Any) -> Vector:
    r"""The combination of earlier solutions that is nearest to A⁻¹b in the norm of A.

    $$x_0 = V (V^\top A V)^{+} V^\top b$$

    with the earlier solutions [count, ...] as the columns of V, at one product each. Directions in
    which VᵀAV is not positive, or as good as zero, are left out.

    Source: Fischer (Computer Methods in Applied Mechanics and Engineering, 1998).

    Example:
        >>> curvature, earlier = jnp.array([1.0, 2.0, 4.0]), jnp.array([[1.0, 1, 0], [0, 1, 1]])
        >>> start = combined(lambda x: curvature * x, jnp.array([1.0, 4.0, 4.0]), earlier)
        >>> start.round(3).tolist()
        [1.0, 2.0, 1.0]
    """
    flat, unravel = trees.ravel(b)
    vectors = jax.vmap(lambda v: trees.ravel(v)[0])(earlier).astype(flat.dtype)
    norms = jnp.linalg.norm(vectors, axis=1, keepdims=True)
    vectors = vectors / jnp.where(norms > 0, norms, 1)
    images = jax.lax.map(lambda v: trees.ravel(product(unravel(v)))[0], vectors)
    inside = vectors @ images.T
    values, rotation = jnp.linalg.eigh((inside + inside.T) / 2)
    # what two solutions that are nearly the same differ by is rounding
    kept = values > 10 * jnp.finfo(flat.dtype).eps * jnp.max(jnp.abs(values))
    weights = rotation.T @ (vectors @ flat) / jnp.where(kept, values, 1)
    start: Vector = unravel((rotation @ jnp.where(kept, weights, 0)) @ vectors)
    return start


def remembered(earlier: Any, solution: Vector, count: int) -> Any:
    """The last `count` solutions [count, ...], the newest first; zeros where there were none yet.

    Example:
        >>> remembered(jnp.array([[1.0], [2.0]]), jnp.array([3.0]), 2).tolist()
        [[3.0], [1.0]]
    """

    def pushed(leaf: Any, before: Any) -> Any:
        return jnp.concatenate([leaf[None], before[: count - 1]])

    if earlier is None:
        earlier = jax.tree.map(lambda v: jnp.zeros((count, *v.shape), v.dtype), solution)
    return jax.tree.map(pushed, solution, earlier)
