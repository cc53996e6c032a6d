"""Rates from theory: measure a problem's constants, propose settings, say what they guarantee."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from memmeta import certificate
from memmeta._shared import checks, trees
from memmeta.certificate._bound import bound, distance_bound, measure
from memmeta.hypergradient import implicit
from memmeta.hypergradient._differences import shifted, step_length
from memmeta.inner import InnerLoop, accelerated
from memmeta.linear_solve import cg, extreme_eigenvalues
from memmeta.linear_solve._spectrum import power_iteration
from memmeta.meta._step import MetaStep, make_meta_step
from memmeta.problem import Batch, Context, MetaParams, Problem, Scalar, hessian_product

# what φ* and v* are measured with: both have converged under it on the problems tried
REFERENCE = InnerLoop(accelerated(), steps=300)
REFERENCE_CG = 50
POWER_STEPS = 6


class Proposal(NamedTuple):
    """Settings for a wanted accuracy, and the constants they come from. `print` it.

    Attributes:
        accuracy: ε, for the mean of ‖∇F(θ_k)‖² over the meta-steps.
        inner_rate: 1/L.
        inner_steps: K of `accelerated()`.
        cg_steps: conjugate-gradient steps.
        outer_rate: 1/L_F, of plain gradient descent.
        batch_size: |B|, fresh tasks a meta-step.
        meta_steps: T.
        smoothness: L, the largest over the tasks.
        strong_convexity: μ, the smallest over the tasks.
        outer_smoothness: L_F.
        variance: σ² = E‖∇F_i − ∇F‖².
        loss: F(θ), an upper bound on F(θ) − min F for losses that are not negative.
        given: which of L, μ and the deviations the problem gives; the others are measured.
    """

    accuracy: float
    inner_rate: float
    inner_steps: int
    cg_steps: int
    outer_rate: float
    batch_size: int
    meta_steps: int
    smoothness: float
    strong_convexity: float
    outer_smoothness: float
    variance: float
    loss: float
    given: tuple[str, ...]

    def __str__(self) -> str:
        given = ", ".join(self.given) or "none"
        condition = self.smoothness / self.strong_convexity
        return (
            f"inner rate    {self.inner_rate:.3g}   = 1/L, L = {self.smoothness:.3g}\n"
            f"inner steps   {self.inner_steps}   accelerated, κ = {condition:.3g}, "
            f"μ = {self.strong_convexity:.3g}\n"
            f"CG steps      {self.cg_steps}\n"
            f"outer rate    {self.outer_rate:.3g}   = 1/L_F, L_F = {self.outer_smoothness:.3g}\n"
            f"batch size    {self.batch_size}   ≥ 3σ²/ε, σ² = {self.variance:.3g}\n"
            f"meta-steps    {self.meta_steps}   ≥ 6 L_F (F(θ₀) − min F)/ε, "
            f"F(θ₀) = {self.loss:.3g}\n"
            f"Guarantee: mean over k of E‖∇F(θ_k)‖² ≤ 2 L_F (F(θ₀) − min F)/T + bias² + σ²/|B| "
            f"≤ {self.accuracy:.3g},\n"
            f"with bias² ≤ ε/3 from the inner steps and CG, for gradient descent outside, if "
            f"L_F, σ² and the\nconstants of the inner problem hold along the way as they do at θ₀. "
            f"Given: {given}; the rest is measured."
        )


def propose(problem: Problem, meta_params: MetaParams, tasks: Batch, accuracy: float) -> Proposal:
    r"""Propose all settings for a wanted accuracy ε of ‖∇F‖², a third of it for each source.

    $$K = \frac{2 \ln (2 A \delta_0 \sqrt{\kappa + 1} / b)}{-\ln(1 - 1/\sqrt\kappa)}, \qquad
      m = \frac{\ln (4 \sqrt\kappa \, B \|\partial_\phi f\| / \mu b)}
               {\ln\frac{\sqrt\kappa + 1}{\sqrt\kappa - 1}}, \qquad b^2 = \epsilon/3$$
    $$\eta = 1/L_F, \qquad |B| = 3 \sigma^2/\epsilon, \qquad T = 6 L_F F(\theta_0)/\epsilon$$

    with A, B as in the certificate times a measured ‖∂c/∂θ‖, and δ₀ = ‖∇_φ g(φ₀)‖/μ.

    Args:
        problem: the problem. What it does not give (L, μ, deviations) is measured.
        meta_params: θ₀, where to measure.
        tasks: a batch to measure on, at least 2 tasks.
        accuracy: ε > 0.

    Returns:
        Settings that `print` shows: `inner_rate` 1/L, `inner_steps` K of `accelerated()`,
        `cg_steps` m, `outer_rate` η of plain gradient descent, `batch_size` |B| fresh tasks a
        meta-step, `meta_steps` T; beside them the wanted `accuracy` and what they come from:
        `smoothness` L and `strong_convexity` μ (the largest and the smallest over the tasks),
        `outer_smoothness` L_F, `variance` σ² = E‖∇F_i − ∇F‖², `loss` F(θ₀), and `given`, the names
        of what the problem gives. As good as these constants are along the whole run.

    Raises:
        ValueError: ε is not positive, there are fewer than 2 tasks, or no positive curvature was
            found.

    Source: the descent lemma with an inexact gradient (docs/theory.md, "Rates"); Nesterov (2004),
    theorem 2.2.3; the Chebyshev bound of CG.

    Example:
        >>> import memmeta as mm
        >>> problem = mm.Problem(
        ...     embed=lambda theta, target: (theta, target),
        ...     inner_loss=lambda phi, c: 0.5 * jnp.sum(jnp.array([1.0, 4.0]) * (phi - c[0]) ** 2),
        ...     outer_loss=lambda phi, c: (0.5 * jnp.sum((phi - c[1]) ** 2), {}),
        ...     init=jnp.zeros_like,
        ... )
        >>> found = propose(problem, jnp.ones(2), jnp.array([[1.0, 2.0], [3.0, 4.0]]), 1e-2)
        >>> round(found.outer_rate, 2), round(found.inner_rate, 2), found.cg_steps < 20
        (1.0, 0.25, True)
    """
    checks.positive("accuracy", accuracy)
    count = trees.leading_size(tasks, "tasks")
    if count < 2:
        raise ValueError(f"tasks: a variance needs at least 2, found {count}.")
    inner, outer = jax.device_get(jax.jit(partial(_measured, problem))(meta_params, tasks))
    mu, largest = float(inner.strong_convexity.min()), float(inner.smoothness.max())
    if not (mu > 0 and math.isfinite(largest)):
        raise ValueError(
            f"problem: the smallest curvature found is {mu:.3g}, the largest {largest:.3g}; the "
            "theory needs a strongly convex inner loss. Add a ridge or a proximal term."
        )
    root, bias = math.sqrt(largest / mu), math.sqrt(accuracy / 3)
    start = 2 * float(inner.inner_slope.max()) * math.sqrt(root**2 + 1) / bias
    linear = 4 * root * float(inner.linear_slope.max()) / bias
    given = {
        "smoothness": problem.smoothness is not None,
        "strong_convexity": problem.strong_convexity is not None,
        "deviations": problem.structure.deviations is not None,
    }
    return Proposal(
        accuracy=accuracy,
        inner_rate=1 / largest,
        inner_steps=_steps(2 * math.log(max(start, 1)), -math.log1p(-1 / max(root, 1 + 1e-9))),
        cg_steps=_steps(math.log(max(linear, 1)), math.log((root + 1) / max(root - 1, 1e-9))),
        outer_rate=1 / float(outer.smoothness),
        batch_size=max(1, math.ceil(3 * float(outer.variance) / accuracy)),
        meta_steps=max(1, math.ceil(6 * float(outer.smoothness * outer.loss) / accuracy)),
        smoothness=largest,
        strong_convexity=mu,
        outer_smoothness=float(outer.smoothness),
        variance=float(outer.variance),
        loss=float(outer.loss),
        given=tuple(name for name, known in given.items() if known),
    )


def _steps(needed: float, rate: float) -> int:
    return max(1, math.ceil(needed / rate))


class _Inner(NamedTuple):
    """For every task: L, μ, and the proposal's A δ₀ and B ‖∂_φ f‖/μ, both times ‖∂c/∂θ‖."""

    smoothness: Float[Array, " tasks"]
    strong_convexity: Float[Array, " tasks"]
    inner_slope: Float[Array, " tasks"]
    linear_slope: Float[Array, " tasks"]


class _Outer(NamedTuple):
    """L_F, σ² and F(θ)."""

    smoothness: Scalar
    variance: Scalar
    loss: Scalar


def _measured(problem: Problem, meta_params: MetaParams, tasks: Batch) -> tuple[_Inner, _Outer]:
    step = make_meta_step(problem, REFERENCE, implicit(cg(REFERENCE_CG)), optax.identity())
    inner = jax.lax.map(partial(_inner, problem, meta_params), tasks)
    return inner, _outer(step, meta_params, tasks)


def _inner(problem: Problem, meta_params: MetaParams, task: Any) -> _Inner:
    context, start = problem.embed(meta_params, task), problem.init(meta_params)
    params = REFERENCE(problem, start, context)
    _, product = hessian_product(problem, params, context)
    outer = jax.grad(lambda phi: problem.outer_loss(phi, context)[0])(params)
    solution = cg(REFERENCE_CG)(product, outer).value
    smallest, largest = extreme_eigenvalues(product, outer, 20)
    if problem.smoothness is not None:
        largest = problem.smoothness(context).astype(largest.dtype)
    if problem.strong_convexity is not None:
        smallest = problem.strong_convexity(context).astype(smallest.dtype)
    first = trees.norm(jax.grad(problem.inner_loss)(start, context))
    distance = distance_bound(first, smallest)
    deviations = problem.structure.deviations
    if deviations is None or problem.strong_convexity is None:
        found = certificate.estimate(problem, start, solution, context)
        a = found.inner / jnp.where(found.distance > 0, found.distance, 1)
        residual = measure(problem, start, solution, context).residual
        amplification = found.linear / jnp.where(residual > 0, residual, 1)
    else:
        here = deviations(problem, params, solution, distance, context)
        here = here._replace(embedding=jnp.ones_like(here.embedding))
        # with ‖r‖ = 1 the linear part of the bound is the factor of ‖r‖
        found = bound(here, distance, jnp.ones_like(distance))
        a, amplification = found.inner / jnp.where(distance > 0, distance, 1), found.linear
    embedding = _embedding_norm(problem, meta_params, task)
    amplified = embedding * amplification * trees.norm(outer)
    return _Inner(largest, smallest, embedding * a * distance, amplified)


def _embedding_norm(problem: Problem, meta_params: MetaParams, task: Any) -> Scalar:
    """‖∂c/∂θ‖ for the part of c that depends on θ, by power steps."""
    floats, others = trees.split_inexact(meta_params)

    def embed(floats: MetaParams) -> Context:
        return trees.split_inexact(problem.embed(trees.merge(floats, others), task))[0]

    _, forward = jax.linearize(embed, floats)
    backward = jax.linear_transpose(forward, floats)
    return _power(lambda d: backward(forward(d))[0], floats) ** 0.5


def _power(product: Any, like: MetaParams) -> Scalar:
    """The largest |eigenvalue| by power steps from a fixed random direction, as ∇F may be zero."""
    leaves, structure = jax.tree.flatten(like)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    drawn = [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    return power_iteration(product, jax.tree.unflatten(structure, drawn), POWER_STEPS)


def _outer(step: MetaStep, meta_params: MetaParams, tasks: Batch) -> _Outer:
    floats, others = trees.split_inexact(meta_params)

    def mean_gradient(floats: MetaParams) -> tuple[MetaParams, Any]:
        return step.gradient(step.init(trees.merge(floats, others)), tasks)

    def squared(task: Any) -> Scalar:
        one = jax.tree.map(lambda leaf: leaf[None], task)
        return trees.norm(step.gradient(step.init(meta_params), one)[0]) ** 2

    mean, metrics = mean_gradient(floats)
    squares = jax.lax.map(squared, tasks)
    count = squares.size
    variance = jnp.maximum(jnp.mean(squares) - trees.norm(mean) ** 2, 0) * count / (count - 1)
    step_size = step_length(None, floats) * (1 + trees.norm(floats))

    def curvature(direction: MetaParams) -> MetaParams:
        """∂²F u, by central differences."""
        plus, minus = (
            mean_gradient(shifted(floats, direction, sign * step_size))[0] for sign in (1.0, -1.0)
        )
        return jax.tree.map(
            lambda up, down: (up - down) / (2 * step_size.astype(up.dtype)), plus, minus
        )

    return _Outer(_power(curvature, floats), variance, metrics.loss)
