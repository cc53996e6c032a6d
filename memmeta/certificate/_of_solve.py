"""What an early end of the linear solve does to a hypergradient, at a stated chance of failure.

For problems that give no constants: products from random directions take the place of μ and of the
bound on ‖∂²_cφ g‖.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from memmeta._shared import checks, trees
from memmeta.linear_solve import cg
from memmeta.linear_solve._spectrum import largest_eigenvalue_bound
from memmeta.problem import Context, Params, Problem, Scalar, SplitContext, hessian_product

MIXED_STEPS = 10
"""Of Lanczos on MᵀM: ‖M‖ multiplies next to nothing, so a factor of two does no harm."""


def error_of_solve(
    problem: Problem,
    params: Params,
    solution: Params,
    context: Context,
    key: Key[Array, ""],
    *,
    failure: float = 1e-6,
    steps: int = 100,
) -> Scalar:
    r"""A bound on what the linear solve adds to the error, true but for a stated chance.

    $$\|M (\hat v - A^{-1} b)\| \le \|M \tilde e\| + \frac{\|M\|}{\mu} \|r - A \tilde e\|, \qquad
      r = b - A \hat v, \quad A \tilde e \approx r$$

    at φ̂ itself, with $A = \partial^2_{\phi\phi} g$, $M = \partial^2_{c\phi} g$, $b = \partial_\phi
    f$. ẽ comes from conjugate gradients; $\mu \le \lambda_{\min}(A)$ and a bound on ‖M‖ from
    Lanczos steps on A and MᵀM, each from one Gaussian direction. No constant of the problem is
    needed; a `Problem.strong_convexity` is used where it is the larger μ. Nothing is said of
    ‖φ̂ − φ*‖: no product at φ̂ can tell how the derivatives change on the way to φ*.

    Costs 2 · `steps` products with A, at least; `steps` vectors are kept.

    Args:
        problem: any whose A is positive definite at φ̂, a network with a proximal term for instance.
        params: φ̂.
        solution: v̂, like `params`, of any solver; without the solver's damping.
        context: of the task; its inexact leaves are what the error is measured in.
        key: of the directions; has to be independent of θ and the task.
        failure: the chance that the bound is wrong, in (0, 1). For n tasks that shall all be
            covered give each the n-th part.
        steps: k, of Lanczos and of conjugate gradients. For n numbers in φ and a condition κ of A
            a positive μ takes about ½ √κ log(4√n/p) of them, 9 √κ at n = 200 and p = 10⁻⁶, and
            never more than n.

    Returns:
        The bound; infinite where the steps do not suffice to tell A from a singular matrix.

    Raises:
        ValueError: `failure` is not between 0 and 1, or `steps` is not positive.

    Source: the bounds on eigenvalues: van Dorsselaer, Hochstenbach, van der Vorst (SIAM J. Matrix
    Anal. Appl. 2000). Derived in docs/theory.md, section "The linear solve alone".

    Example:
        >>> curvature = jnp.linspace(1.0, 10.0, 50)
        >>> problem = Problem(
        ...     embed=lambda theta, batch: theta,
        ...     inner_loss=lambda phi, c: 0.5 * phi @ (curvature * phi) - phi @ c,
        ...     outer_loss=lambda phi, c: (jnp.sum(phi), {}),
        ...     init=jnp.zeros_like,
        ... )
        >>> phi, v = jnp.zeros(50), 0.9 / curvature
        >>> found = error_of_solve(problem, phi, v, jnp.ones(50), jax.random.key(0))
        >>> error = jnp.linalg.norm(v - 1 / curvature)
        >>> bool(error <= found) and bool(found < 1.1 * error)
        True
    """
    checks.probability("failure", failure)
    checks.count("steps", steps)
    split = SplitContext(*trees.split_inexact(context))
    _, product = hessian_product(problem, params, context)
    b = jax.grad(lambda phi: problem.outer_loss(phi, context)[0])(params)

    def inner_gradient(active: Context) -> Params:
        return jax.grad(problem.inner_loss)(params, split.at(active))

    _, forward = jax.linearize(inner_gradient, split.active)
    transposed = jax.linear_transpose(forward, split.active)

    def mixed(u: Params) -> Context:
        (image,) = transposed(u)
        return image

    of_curvature, of_mixed = jax.random.split(key)
    half = failure / 2
    curvature = -largest_eigenvalue_bound(
        lambda u: jax.tree.map(jnp.negative, product(u)), b, of_curvature, half, steps
    )
    if problem.strong_convexity is not None:
        given = problem.strong_convexity(context).astype(curvature.dtype)
        curvature = jnp.fmax(curvature, given)
    square = largest_eigenvalue_bound(lambda u: forward(mixed(u)), b, of_mixed, half, MIXED_STEPS)

    r = jax.tree.map(jnp.subtract, b, product(solution))
    corrected = cg(steps)(product, r).value
    left = jax.tree.map(jnp.subtract, r, product(corrected))
    rest = jnp.sqrt(square) * trees.norm(left) / jnp.where(curvature > 0, curvature, 1)
    total = trees.norm(mixed(corrected)) + rest
    return jnp.where((curvature > 0) & jnp.isfinite(total), total, jnp.inf)
