"""A low-rank picture of a matrix from a few random products, to precondition with."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from memmeta._shared import checks, trees
from memmeta._shared.readable import named
from memmeta.linear_solve._solution import Preconditioner, Product, System, Vector
from memmeta.problem import Scalar


@named
def nystrom(rank: int = 20, *, key: Key[Array, ""] | None = None) -> Preconditioner:
    r"""The randomised Nyström preconditioner, for spectra that fall off.

    $$G \approx G \Omega \, (\Omega^\top G \Omega)^{-1} (G \Omega)^\top = U \Lambda U^\top, \qquad
      M^{-1} = U \Big(\frac{\lambda_r + \rho}{\Lambda + \rho} - I\Big) U^\top + I$$

    with A + λ I = G + ρ I, Ω [parameters, r] random and orthonormal, and λ_r the smallest of Λ.
    M⁻¹ A has its r largest eigenvalues brought down to λ_r + ρ, the others stay. ρ is the damping
    and what ridge the problem's `Structure` or its `strong_convexity` shows: a sketch of A itself
    would see little but a ridge, where there are many parameters. Positive for any A: directions in
    which G has no positive curvature are left out of U.

    Args:
        rank: r, at most the dimension; that many products are made, one after the other, and that
            many vectors kept.
        key: of Ω; None: `jax.random.key(0)`. Every system has the same.

    Returns:
        The preconditioner.

    Raises:
        ValueError: `rank` is no whole number, 1 or more.

    Source: Frangella, Tropp, Udell (SIAM J. Matrix Anal. Appl. 2023), Algorithm 2.1 and section 5;
    for bilevel problems: Hataya, Yamada (AISTATS 2023).

    Example:
        >>> from memmeta.linear_solve import cg
        >>> scales = jnp.concatenate([jnp.geomspace(1e3, 10.0, 5), jnp.ones(45)])
        >>> found = cg(5, preconditioner=nystrom(10))(lambda x: scales * x, jnp.ones(50))
        >>> float(found.residual) < 1e-2
        True
    """
    checks.count("rank", rank)

    def preconditioner(system: System) -> tuple[Product, int]:
        flat, unravel = trees.ravel(system.like)
        columns = min(rank, flat.size)
        drawn = jax.random.key(0) if key is None else key

        def image(x: Array) -> Array:
            return trees.ravel(system.product(unravel(x)))[0] - ridge * x

        ridge = known_ridge(system, flat.dtype)
        basis, values = sketch(image, flat, columns, drawn)
        least = jnp.min(values)
        rest = ridge + system.damping
        weights = (least + rest) / (values + rest) - 1
        # a sketch with NaN, or of a matrix without a positive direction, says nothing
        weights = jnp.where(jnp.isfinite(weights), weights, 0)
        basis = jnp.where(jnp.isfinite(basis), basis, 0)

        def inverse(r: Vector) -> Vector:
            vector = trees.ravel(r)[0]
            return unravel(vector + basis @ (weights * (basis.T @ vector)))

        return inverse, columns

    return preconditioner


def known_ridge(system: System, dtype: Any) -> Scalar:
    """ρ with A − ρ I positive semidefinite as far as the problem says; 0 where it says nothing."""
    problem, context = system.problem, system.context
    fit = None if problem is None else problem.structure.composed(context)
    if fit is not None:
        ridge = fit.ridge
    elif problem is not None and problem.strong_convexity is not None:
        ridge = problem.strong_convexity(context)
    else:
        ridge = 0.0
    return jnp.asarray(jax.lax.stop_gradient(ridge), dtype)


def sketch(
    image: Product, like: Float[Array, " n"], rank: int, key: Key[Array, ""]
) -> tuple[Float[Array, "n {rank}"], Float[Array, " {rank}"]]:
    """U and Λ of `nystrom`; directions without positive curvature have U = 0 and the largest Λ.

    Example:
        >>> spectrum = jnp.array([4.0, 1.0, 0.0])
        >>> basis, values = sketch(lambda x: spectrum * x, spectrum, 3, jax.random.key(0))
        >>> ((basis * values) @ basis.T).round(3).diagonal().tolist()
        [4.0, 1.0, 0.0]
    """
    omega = jnp.linalg.qr(jax.random.normal(key, (like.size, rank), like.dtype))[0]
    images = jax.lax.map(image, omega.T).T
    eps = jnp.finfo(like.dtype).eps
    core = omega.T @ images
    inside, rotation = jnp.linalg.eigh((core + core.T) / 2)
    # As a Cholesky factor would do it, but for an indefinite core too.
    kept = inside > 10 * eps * jnp.max(jnp.abs(inside))
    root = jnp.where(kept, jax.lax.rsqrt(jnp.where(kept, inside, 1)), 0)
    basis, singular, _ = jnp.linalg.svd((images @ rotation) * root, full_matrices=False)
    values = singular**2
    seen = values > eps * jnp.max(values)
    return jnp.where(seen, basis, 0), jnp.where(seen, values, jnp.max(values))
