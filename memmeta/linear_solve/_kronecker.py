"""One Kronecker product a layer in place of a Gauss-Newton matrix, to precondition with."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from memmeta import _checks
from memmeta import _trees as trees
from memmeta.linear_solve._solution import Preconditioner, Product, System, Vector
from memmeta.problem import Composite, Params, require_composite


class Factors(NamedTuple):
    """The eigenvectors of both factors of one layer, and 1/(eigenvalues + ρ) of their product."""

    left: Float[Array, "rows rows"]
    right: Float[Array, "columns columns"]
    inverse: Float[Array, "rows columns"]


def kronecker(probes: int = 8, *, key: Key[Array, ""] | None = None) -> Preconditioner:
    r"""The Kronecker-factored preconditioner, for dense and convolutional layers of any network.

    $$M = \operatorname{blockdiag}_\ell \frac{L_\ell \otimes R_\ell}{\operatorname{tr} L_\ell}
      + (\rho + \lambda) I, \qquad L = \mathbb{E}[V V^\top], \quad R = \mathbb{E}[V^\top V]$$

    with V the part of layer ℓ of Jᵀ (∂²ℓ)^(1/2) ε, ε of independent entries with mean 0 and
    variance 1, so that E[vec V vec Vᵀ] is that layer's block of the Gauss–Newton matrix Jᵀ ∂²ℓ J.
    A convolution's kernel is a matrix of (height · width · inputs) rows. No activations are looked
    at, so the model may be anything, and what batch normalisation couples is seen. Always positive.

    Args:
        probes: number of ε; each costs one gradient of the outputs, less than one product, and is
            counted as one.
        key: of ε; None: `jax.random.key(0)`. Every system has the same.

    Returns:
        The preconditioner; it needs a problem with a `Structure.composite` or a `Structure.head`.

    Raises:
        ValueError: `probes` is no whole number, 1 or more; (when traced) the problem has neither.

    Source: factors from moments of V: Gupta, Koren, Singer (Shampoo, ICML 2018); that this is one
    power step towards the nearest Kronecker product: Morwani et al. (2024); the idea: Martens and
    Grosse (ICML 2015).

    Example:
        >>> import memmeta as mm
        >>> solver = mm.linear_solve.cg(10, preconditioner=kronecker())
        >>> estimator = mm.hypergradient.implicit(solver, products="gauss_newton")
    """
    _checks.count("probes", probes)

    def preconditioner(system: System) -> tuple[Product, int]:
        fit = require_composite(system.problem, system.context, "kronecker")
        drawn = jax.random.key(0) if key is None else key
        samples = jax.lax.stop_gradient(_samples(fit, system.params, probes, drawn))
        samples = jax.tree.map(lambda v, like: v.astype(like.dtype), samples, system.like)
        ridge = jnp.asarray(fit.ridge + system.damping)
        factors = [_factors(v, ridge) for v in jax.tree.leaves(samples)]

        def inverse(r: Vector) -> Vector:
            leaves, structure = jax.tree.flatten(r)
            pairs = zip(factors, leaves, strict=True)
            return jax.tree.unflatten(structure, [_divided(f, leaf) for f, leaf in pairs])

        return inverse, probes

    return preconditioner


def _samples(fit: Composite, params: Params, probes: int, key: Array) -> Params:
    """[probes, ...] Jᵀ (∂²ℓ)^(1/2) ε, like φ."""
    outputs, pull_back = jax.vjp(fit.outputs, params)
    flat, unravel = trees.ravel(outputs)
    curvature = jax.hessian(lambda z: fit.loss(unravel(z)))(flat)
    finite = jnp.all(jnp.isfinite(curvature))
    # eigenvectors of a matrix with NaN may never come
    values, vectors = jnp.linalg.eigh(jnp.where(finite, curvature, 0))
    root = vectors * jnp.sqrt(jnp.maximum(values, 0))
    signs = jax.random.rademacher(key, (probes, flat.size), flat.dtype)
    found: Params = jax.lax.map(lambda z: pull_back(unravel(z))[0], signs @ root.T)
    return found


def _factors(samples: Float[Array, "probes ..."], ridge: Array) -> Factors:
    """Of one layer, from the samples of its part of the gradient."""
    matrices = _matrices(samples)
    matrices = jnp.where(jnp.isfinite(matrices), matrices, 0)
    left = jnp.einsum("sij,skj->ik", matrices, matrices) / len(matrices)
    right = jnp.einsum("sij,sik->jk", matrices, matrices) / len(matrices)
    (left_values, left), (right_values, right) = jnp.linalg.eigh(left), jnp.linalg.eigh(right)
    trace = jnp.sum(left_values)
    product = jnp.outer(jnp.maximum(left_values, 0), jnp.maximum(right_values, 0))
    curvature = product / jnp.where(trace > 0, trace, 1)
    # without a ridge the directions of no curvature are left as flat as rounding
    floor = jnp.finfo(product.dtype).eps * jnp.max(curvature)
    shifted = curvature + jnp.maximum(jnp.asarray(ridge, product.dtype), floor)
    return Factors(left, right, 1 / jnp.where(shifted > 0, shifted, 1))


def _divided(factors: Factors, leaf: Array) -> Array:
    matrix = _matrices(leaf[None])[0]
    inside = factors.inverse * (factors.left.T @ matrix @ factors.right)
    return (factors.left @ inside @ factors.right.T).reshape(leaf.shape)


def _matrices(stack: Float[Array, "count ..."]) -> Float[Array, "count rows columns"]:
    """Each array as a matrix: what it maps from × what it maps to; vectors as single columns."""
    columns = stack.shape[-1] if stack.ndim > 2 else 1
    return stack.reshape(len(stack), -1, columns)
