"""Step lengths of difference quotients."""

from typing import Any

import jax
import jax.numpy as jnp

from memmeta import _trees as trees
from memmeta.problem import MetaParams, Scalar


def step_length(scale: float | None, tree: Any) -> float:
    r"""The step length of central differences in a tree of arrays.

    Their error is δ² by the third derivative and ε/δ by rounding: least at δ ∼ ε^(1/3), where it is
    of the size of ε^(2/3), 2e-5 in float32 and 4e-11 in float64.

    Args:
        scale: δ; None means ε^(1/3).
        tree: what is moved, or its shapes; the coarsest of its floating-point dtypes counts.

    Returns:
        δ.

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


def shifted(floats: MetaParams, direction: MetaParams, length: float | Scalar) -> MetaParams:
    """θ + length · u."""
    return jax.tree.map(lambda x, u: x + jnp.asarray(length).astype(x.dtype) * u, floats, direction)
