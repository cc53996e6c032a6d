"""One Kronecker product a layer in place of a Gauss-Newton matrix, to precondition with."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from memmeta._shared import checks
from memmeta._shared.readable import named
from memmeta.linear_solve._solution import Preconditioner, Product, System, Vector
from memmeta.problem import (
    Composite,
    LinearHead,
    Params,
    Scalar,
    require_composite,
    stacked,
    unstacked,
)


class Factors(NamedTuple):
    """The eigenvectors of both factors of one layer, and 1/(eigenvalues + ρ) of their product."""

    left: Float[Array, "rows rows"]
    right: Float[Array, "columns columns"]
    inverse: Float[Array, "rows columns"]


@named
def kronecker(probes: int = 8, *, key: Key[Array, ""] | None = None) -> Preconditioner:
    r"""The Kronecker-factored preconditioner, for dense and convolutional layers of any network.

    $$M = \operatorname{blockdiag}_\ell \frac{L_\ell \otimes R_\ell}{\operatorname{tr} L_\ell}
      + (\rho + \lambda) I, \qquad L = \mathbb{E}[V V^\top], \quad R = \mathbb{E}[V^\top V]$$

    with V the part of layer ℓ of Jᵀ (∂²ℓ)^(1/2) ε, ε of independent entries with mean 0 and
    variance 1, so that E[vec V vec Vᵀ] is that layer's block of the Gauss–Newton matrix Jᵀ ∂²ℓ J.
    A convolution's kernel is a matrix of (height · width · inputs) rows. No activations are looked
    at, so the model may be anything, and what batch normalisation couples is seen. Always positive.

    Of a linear head the expectations are taken exactly, from its features and without a product.
    The loss is taken for a sum over the rows of the outputs; of another one only the curvature
    within rows is seen.

    Args:
        probes: number of ε; each costs one gradient of the outputs, less than one product, and is
            counted as one. Not read where there is a `Structure.head`.
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
    checks.count("probes", probes)

    def preconditioner(system: System) -> tuple[Product, int]:
        head = None if system.problem is None else system.problem.structure.head
        if head is not None:
            return _of_head(head(system.context), system), 0
        fit = require_composite(system.problem, system.context, "kronecker")
        drawn = jax.random.key(0) if key is None else key
        samples = jax.lax.stop_gradient(_samples(fit, system.params, probes, drawn))
        samples = jax.tree.map(lambda v, like: v.astype(like.dtype), samples, system.like)
        ridge = jnp.asarray(fit.ridge + system.damping)
        factors = [_sampled(v, ridge) for v in jax.tree.leaves(samples)]

        def inverse(r: Vector) -> Vector:
            leaves, structure = jax.tree.flatten(r)
            pairs = zip(factors, leaves, strict=True)
            return jax.tree.unflatten(structure, [_divided(f, leaf) for f, leaf in pairs])

        return inverse, probes

    return preconditioner


def _of_head(head: LinearHead, system: System) -> Product:
    """L = Σ_j tr(H_j) x̃_j x̃_jᵀ and R = Σ_j ‖x̃_j‖² H_j, with H_j the loss's Hessian in row j."""
    features = jax.lax.stop_gradient(head.features)
    blocks = row_blocks(head.support_loss, features @ stacked(system.params))
    traces = jnp.trace(blocks, axis1=1, axis2=2)
    left = jnp.einsum("n,ni,nk->ik", traces, features, features)
    right = jnp.einsum("n,nij->ij", jnp.sum(features**2, axis=1), blocks)
    factors = jax.lax.stop_gradient(_factors(left, right, head.ridge + system.damping))
    return lambda r: unstacked(_divided(factors, stacked(r)), r)


def row_blocks(
    loss: Callable[[Array], Scalar], outputs: Float[Array, "rows columns"]
) -> Float[Array, "rows columns columns"]:
    """The Hessian of a sum over rows, by one product for each column.

    Example:
        >>> row_blocks(lambda z: jnp.sum(z[:, 0] * z[:, 1]), jnp.ones((3, 2)))[0].tolist()
        [[0.0, 1.0], [1.0, 0.0]]
    """
    units = jnp.eye(outputs.shape[1], dtype=outputs.dtype)
    tangents = jnp.broadcast_to(units[:, None], (len(units), *outputs.shape))
    found = jax.vmap(lambda t: jax.jvp(jax.grad(loss), (outputs,), (t,))[1])(tangents)
    blocks = jnp.moveaxis(found, 0, -1)
    # eigenvectors of a matrix with NaN may never come
    blocks = jnp.where(jnp.isfinite(blocks), blocks, 0)
    return (blocks + jnp.swapaxes(blocks, 1, 2)) / 2


def _samples(fit: Composite, params: Params, probes: int, key: Array) -> Params:
    """[probes, ...] Jᵀ (∂²ℓ)^(1/2) ε, like φ."""
    outputs, pull_back = jax.vjp(fit.outputs, params)
    rows = outputs.reshape(outputs.shape[0] if outputs.ndim else 1, -1)
    values, vectors = jnp.linalg.eigh(
        row_blocks(lambda z: fit.loss(z.reshape(outputs.shape)), rows)
    )
    roots = vectors * jnp.sqrt(jnp.maximum(values, 0))[:, None]
    signs = jax.random.rademacher(key, (probes, *rows.shape), rows.dtype)
    cotangents = jnp.einsum("nij,pnj->pni", roots, signs).reshape(probes, *outputs.shape)
    found: Params = jax.lax.map(lambda z: pull_back(z)[0], cotangents)
    return found


def _sampled(samples: Float[Array, "probes ..."], ridge: Array) -> Factors:
    """Of one layer, from the samples of its part of the gradient."""
    matrices = _matrices(samples)
    matrices = jnp.where(jnp.isfinite(matrices), matrices, 0)
    left = jnp.einsum("sij,skj->ik", matrices, matrices) / len(matrices)
    right = jnp.einsum("sij,sik->jk", matrices, matrices) / len(matrices)
    return _factors(left, right, ridge)


def _factors(
    left: Float[Array, "rows rows"], right: Float[Array, "columns columns"], ridge: Scalar
) -> Factors:
    """Of L ⊗ R / tr L + ρ I."""
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
