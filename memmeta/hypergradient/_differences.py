"""Step lengths of difference quotients."""

from typing import Any

import jax
import jax.numpy as jnp

from memmeta._shared import trees
from memmeta.problem import MetaParams, Scalar


def step_length(scale: float | None, tree: Any) -> float:
    r"""The step length δ of central differences in a tree of arrays.

    A central difference is wrong by about δ² (the third derivative) plus ε/δ (rounding), together
    least at δ ~ ε^(1/3), where the error is about ε^(2/3): 2e-5 in float32 and 4e-11 in float64.

    Args:
        scale: δ; None means ε^(1/3).
        tree: the arrays that are perturbed, or their shapes; ε is that of the coarsest
            floating-point dtype among them.

    Source: Nocedal and Wright, Numerical Optimization (2006), section 8.1.

    Example:
        >>> bool(step_length(None, jnp.ones(2)) ** 3 == jnp.finfo(jnp.float32).eps)
        True
    """
    if scale is not None:
        return scale
    leaves = [leaf for leaf in jax.tree.leaves(tree) if trees.is_inexact(leaf)]
    coarsest = max((float(jnp.finfo(leaf.dtype).eps) for leaf in leaves), default=1.0)
    return float(coarsest ** (1 / 3))


def shifted(floats: MetaParams, direction: MetaParams, step: float | Scalar) -> MetaParams:
    """θ + step · u."""
    return jax.tree.map(lambda x, u: x + jnp.asarray(step).astype(x.dtype) * u, floats, direction)
