"""How a linear solve ended, in one sentence."""

from memmeta.linear_solve._solution import LinearSolution
from memmeta.linear_solve._status import SENTENCES, Status


def explain(solution: LinearSolution, tolerance: float = 1e-3) -> str:
    """Say in one sentence how a solver ended, and what to do about it.

    Args:
        solution: of one system, outside `jax.jit`.
        tolerance: relative residual that counts as solved.

    Returns:
        The sentence.

    Example:
        >>> import jax.numpy as jnp
        >>> solution = LinearSolution(jnp.ones(2), jnp.float32(0.2), jnp.float32(0.1), jnp.int32(5))
        >>> explain(solution)
        'Not solved: residual 0.2 after 5 products. Take more steps, a preconditioner, or damping.'
    """
    residual, curvature = float(solution.residual), float(solution.curvature)
    status = Status(int(solution.status))
    if not residual < float("inf"):
        return SENTENCES[Status.NOT_FINITE]
    if status is not Status.SOUND:
        return SENTENCES[status]
    after = f"residual {residual:.2g} after {int(solution.iterations)} products"
    if curvature < 0:
        return (
            f"Negative curvature {curvature:.2g} met, {after}: the inner loss is not convex here. "
            "Add a ridge or a proximal term, take more inner steps, or use minres()."
        )
    if residual <= tolerance:
        return f"Solved: {after}, smallest curvature met {curvature:.2g}."
    if curvature < 1e-6:
        return (
            f"Not solved: {after}, and the system is close to singular (curvature {curvature:.2g})."
            " Add a ridge or damping."
        )
    return f"Not solved: {after}. Take more steps, a preconditioner, or damping."
