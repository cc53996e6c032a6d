r"""What a bilevel problem is: four pure functions, their derivatives, and the few-shot task.

min_θ mean_i f_i(θ, φ_i*),      φ_i* = argmin_φ g_i(θ, φ)
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, Shaped

from memmeta._shared import trees
from memmeta._shared.readable import readable

__all__ = [
    "Composite",
    "Deviations",
    "LinearHead",
    "Problem",
    "SplitContext",
    "Structure",
    "Task",
    "gauss_newton_product",
    "hessian_product",
]

MetaParams: TypeAlias = PyTree[Any]
"""θ: what the outer optimiser changes."""
Params: TypeAlias = PyTree[Any]
"""φ: what the inner loop of one task changes."""
Batch: TypeAlias = PyTree[Any]
"""The data of one task (or, with a leading axis, of several)."""
Context: TypeAlias = PyTree[Any]
"""Everything the losses of one task need that its inner loop does not change."""
Scalar: TypeAlias = Float[Array, ""]


class Task(NamedTuple):
    """A few-shot task: examples to adapt on (support) and examples to evaluate on (query).

    Attributes:
        support_inputs: [support, ...] examples, any dtype (images are uint8 until the network), or
            a pytree of such arrays, for instance {"ids": ..., "mask": ...}.
        support_targets: [support, ...] class indices (int32) or regression targets (float).
        query_inputs: [query, ...] examples.
        query_targets: [query, ...] class indices or regression targets. A class index of -1, here
            and above, marks padding, which counts in no loss, no batch statistic and no accuracy.
        extras: whatever else the task has, None for nothing. The networks of `memmeta.models` read
            one entry: of {"key": a PRNG key} they draw their noise, such as dropout.
    """

    support_inputs: PyTree[Shaped[Array, "support ..."]]
    support_targets: Shaped[Array, "*support_targets"]
    query_inputs: PyTree[Shaped[Array, "query ..."]]
    query_targets: Shaped[Array, "*query_targets"]
    extras: PyTree = None


class Deviations(NamedTuple):
    r"""Bounds on how much one task's derivatives change between φ̂ and φ*, v̂ held fixed.

    φ̂ is the inner loop's answer, φ* the minimiser, v̂ the linear solver's answer and c the context.
    With $M = \partial^2_{c\phi} g$ and $H = \partial^2_{\phi\phi} g$, a hat stands for values at φ̂
    and a star for those at φ*. `memmeta.certificate.deviations_from` computes them from Lipschitz
    constants.

    Attributes:
        outer_context: bound on ‖∂_c f(φ̂) − ∂_c f(φ*)‖.
        outer_params: bound on ‖∂_φ f(φ̂) − ∂_φ f(φ*)‖.
        mixed: bound on ‖(M̂ − M*) v̂‖.
        hessian: bound on ‖M* H*⁻¹ (Ĥ − H*) v̂‖.
        sensitivity: bound on ‖M* H*⁻¹‖ = ‖∂φ*/∂c‖.
        embedding: bound on ‖∂c/∂θ‖, to bound errors of the gradient in θ; 1 for errors in c.
    """

    outer_context: Scalar
    outer_params: Scalar
    mixed: Scalar
    hessian: Scalar
    sensitivity: Scalar
    embedding: Scalar


@dataclass(frozen=True)
class LinearHead:
    r"""One task's losses as functions of a linear head's outputs Z = X̃ Φ.

        g(Φ) = support_loss(X̃ Φ) + ridge/2 ‖Φ‖²,      f(Φ) = query_loss(X̃' Φ)

    Attributes:
        features: X̃, the support features with a column of ones.
        query_features: X̃', those of the query.
        support_loss: outputs [support, ways] -> ℓ.
        query_loss: outputs [query, ways] -> (f, aux).
        ridge: the strength of the quadratic penalty.
    """

    features: Float[Array, "support augmented"]
    query_features: Float[Array, "query augmented"]
    support_loss: Callable[[Array], Scalar]
    query_loss: Callable[[Array], tuple[Scalar, Any]]
    ridge: Scalar


@dataclass(frozen=True)
class Composite:
    r"""One task's inner loss as a convex function of a model's outputs, and a quadratic.

        g(φ) = loss(outputs(φ)) + ridge/2 ‖φ − anchor‖²,      loss convex

    Its Gauss–Newton matrix Jᵀ ∂²loss J + ridge · I, with J = ∂outputs, is never indefinite.

    Attributes:
        outputs: φ -> Z, an array of any shape: those of a network on the support examples.
        loss: Z -> ℓ.
        ridge: the strength of the ridge or proximal term, whatever its anchor.
    """

    outputs: Callable[[Params], Array]
    loss: Callable[[Array], Scalar]
    ridge: Scalar | float


def stacked(params: Params) -> Float[Array, "augmented ways"]:
    """Φ = [kernel; bias] of a linear head as one matrix, in float32 at least."""
    matrix = jnp.concatenate([params["kernel"], params["bias"][None]])
    return matrix.astype(trees.accumulator(matrix.dtype))


def unstacked(matrix: Float[Array, "augmented ways"], like: Params) -> Params:
    """The inverse of `stacked`, in the dtypes of `like`."""
    found = {"kernel": matrix[:-1], "bias": matrix[-1]}
    return jax.tree.map(lambda new, old: new.astype(old.dtype), found, like)


@dataclass(frozen=True)
class Structure:
    """What is known of a problem's losses beyond their values; every field is optional.

    Attributes:
        head: context -> `LinearHead`. Lets `woodbury` and `sample_space` work on (support × ways)
            numbers, however many features there are. φ must then be {"kernel": [features, ways],
            "bias": [ways]}.
        composite: context -> `Composite`. Lets products be Gauss–Newton ones and `kronecker` see
            the layers. Not needed where there is a `head`.
        deviations: (problem, φ̂, v̂, radius, context) -> `Deviations` for every φ* within that
            distance of φ̂. With it and `Problem.strong_convexity` every implicit hypergradient has
            a rigorous error bound.
        solver: a `memmeta.linear_solve.LinearSolver` whose solves are cheap beside `embed`. With it
            the error bound is taken by way of a better answer, which Newton steps with it give:
            sharper by one or two orders of magnitude.
        check: tasks -> None, raising a ValueError for a batch that the losses cannot read. Called
            outside compiled code, before a batch of new shapes is used for the first time.
    """

    head: Callable[[Context], LinearHead] | None = None
    deviations: "Callable[[Problem, Params, Params, Scalar, Context], Deviations] | None" = None
    solver: Callable[..., Any] | None = None
    check: Callable[[Batch], None] | None = None
    composite: Callable[[Context], Composite] | None = None

    def composed(self, context: Context) -> Composite | None:
        """The `composite` of a context, or what the `head` says of it; None where neither is."""
        if self.composite is not None:
            return self.composite(context)
        if self.head is None:
            return None
        head = self.head(context)
        return Composite(
            lambda params: head.features @ stacked(params), head.support_loss, head.ridge
        )


@dataclass(frozen=True)
class Problem:
    r"""A bilevel problem over tasks, as four pure functions of one task.

    $$\min_\theta \; \frac1n \sum_i f_i(\theta, \phi_i^*), \qquad
      \phi_i^* = \arg\min_\phi g_i(\theta, \phi)$$

    θ enters both losses only through the context `embed(θ, batch)`, which is computed once per task
    however long the inner loop is.

    Attributes:
        embed: (θ, batch) -> context. For a linear head: the features. When everything adapts: the
            batch, together with θ where a proximal term needs it.
        inner_loss: (φ, context) -> g, a scalar on the support examples.
        outer_loss: (φ, context) -> (f, aux), on the query examples; aux is any pytree of arrays.
        init: θ -> φ₀, where every task's inner loop starts.
        smoothness: context -> L with ∂²_φφ g ⪯ L·I for every φ. Optional: without it the default
            inner solvers measure the curvature and check every step. With it no step is checked.
        strong_convexity: context -> μ with ∂²_φφ g ⪰ μ·I for every φ. Optional: a ridge or a
            proximal term gives it. Certificates are rigorous only with it.
        structure: what else is known of the losses, see `Structure`.

    Example:
        >>> problem = Problem(
        ...     embed=lambda theta, batch: (theta, batch),
        ...     inner_loss=lambda phi, context: 0.5 * jnp.sum((phi - context[0] * context[1]) ** 2),
        ...     outer_loss=lambda phi, context: (jnp.sum(phi**2), {}),
        ...     init=lambda theta: jnp.zeros(3),
        ... )
        >>> float(problem.inner_loss(problem.init(2.0), problem.embed(2.0, jnp.ones(3))))
        6.0
    """

    embed: Callable[[MetaParams, Batch], Context]
    inner_loss: Callable[[Params, Context], Scalar]
    outer_loss: Callable[[Params, Context], tuple[Scalar, Any]]
    init: Callable[[MetaParams], Params]
    smoothness: Callable[[Context], Scalar] | None = None
    strong_convexity: Callable[[Context], Scalar] | None = None
    structure: Structure = Structure()

    @property
    def certifiable(self) -> bool:
        """Whether the problem gives what a rigorous error bound needs."""
        return self.strong_convexity is not None and self.structure.deviations is not None


def hessian_product(
    problem: Problem, params: Params, context: Context
) -> tuple[Params, Callable[[Params], Params]]:
    r"""∇_φ g and u ↦ ∂²_φφ g u at φ, forward over reverse (reverse twice through `jax.custom_vjp`).

    Each product recomputes the intermediate values of the gradient, so that φ alone is kept between
    products and one product takes the memory of about two gradients. `jax.linearize` by itself
    would keep them: twice the memory, at most a twentieth less time (jax 0.10.2, CPU).

    Args:
        problem: its inner loss is used.
        params: φ.
        context: of one task.

    Returns:
        The gradient, and the product.

    Source: Pearlmutter (1994).

    Example:
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

    # Without it `jax.linearize` keeps every intermediate value of the gradient while the linear
    # solver runs.
    @jax.checkpoint
    def slope(params: Params) -> Params:
        return jax.grad(problem.inner_loss)(params, context)

    try:
        return jax.linearize(slope, params)
    except TypeError as error:
        _require_no_forward_rule(error)
    # The Hessian is its own transpose.
    gradient, transposed = jax.vjp(slope, params)
    return gradient, lambda u: transposed(u)[0]


def gauss_newton_product(
    problem: Problem, params: Params, context: Context
) -> Callable[[Params], Params]:
    r"""u ↦ (Jᵀ ∂²ℓ J + ρ I) u at φ: the Hessian without the curvature of the model itself.

    $$\partial^2_{\phi\phi} g = J^\top \partial^2\ell \, J + \rho I
      + \sum_k \frac{\partial\ell}{\partial Z_k} \partial^2_{\phi\phi} Z_k$$

    Equal to the Hessian where the outputs Z are linear in φ or their loss ℓ has no slope.

    Args:
        problem: with a `structure.composite` or a `structure.head`.
        params: φ.
        context: of one task.

    Returns:
        The product.

    Raises:
        ValueError: the problem has neither.

    Source: Schraudolph (2002); Martens (2020), section 8.

    Example:
        >>> fit = Composite(lambda phi: phi**2, lambda z: 0.5 * jnp.sum(z**2), 1.0)
        >>> g = Problem(
        ...     embed=lambda theta, batch: batch,
        ...     inner_loss=lambda phi, c: fit.loss(fit.outputs(phi)) + 0.5 * jnp.sum(phi**2),
        ...     outer_loss=lambda phi, c: (jnp.sum(phi), {}),
        ...     init=lambda theta: theta,
        ...     structure=Structure(composite=lambda c: fit),
        ... )
        >>> gauss_newton_product(g, jnp.array([2.0]), None)(jnp.ones(1)).tolist()
        [17.0]
    """
    fit = require_composite(problem, context, "gauss_newton")
    # As in `hessian_product`: φ alone is kept between products.
    outputs = jax.checkpoint(fit.outputs)

    def product(u: Params) -> Params:
        values, tangent = jax.jvp(outputs, (params,), (u,))
        curved = jax.jvp(jax.grad(fit.loss), (values,), (tangent,))[1]
        (image,) = jax.vjp(outputs, params)[1](curved)
        return jax.tree.map(lambda a, b: a + jnp.asarray(fit.ridge, b.dtype) * b, image, u)

    return product


def require_composite(problem: Problem | None, context: Context, name: str) -> Composite:
    """The problem's `Composite` at a context.

    Raises:
        ValueError: it has none, naming who asks.
    """
    fit = None if problem is None else problem.structure.composed(context)
    if fit is None:
        raise ValueError(
            f"{name}: expected a problem with a `structure.composite` (or a `structure.head`), "
            "found None. Give Problem(structure=Structure(composite=lambda context: "
            "Composite(outputs, loss, ridge))), or use products='hessian' and nystrom()."
        )
    return fit


def _require_no_forward_rule(error: TypeError) -> None:
    """Raise an error again unless it says that a `jax.custom_vjp` has no forward derivative."""
    if "forward-mode" not in str(error):
        raise error


class SplitContext(NamedTuple):
    """A context in two parts: the leaves that depend on θ, and the others.

    Estimators differentiate by `active` alone; the user's functions always see `whole`.

    Attributes:
        active: the leaves that depend on θ, None elsewhere.
        passive: the other leaves, None where `active` has one.
    """

    active: Context
    passive: Context

    @property
    def whole(self) -> Context:
        """The context as `embed` made it."""
        return self.at(self.active)

    def at(self, active: Context) -> Context:
        """The whole context with other values of its active leaves."""
        return trees.merge(active, self.passive)


def outer_gradients(
    problem: Problem, params: Params, context: SplitContext
) -> tuple[Params, Context]:
    """∂_φ f and ∂_c f at φ, the latter for the active leaves of the context."""

    def outer(params: Params, active: Context) -> Scalar:
        return problem.outer_loss(params, context.at(active))[0]

    gradients: tuple[Params, Context] = jax.grad(outer, argnums=(0, 1))(params, context.active)
    return gradients


class Products(NamedTuple):
    """The first derivatives of g at a point, and the second ones along a direction u.

    Attributes:
        gradient: ∇_φ g.
        hessian: ∂²_φφ g u.
        mixed: ∂²_cφ g u.
    """

    gradient: Params
    hessian: Params
    mixed: Context


def products(problem: Problem, params: Params, u: Params, context: SplitContext) -> Products:
    """∇_φ g, ∂²_φφ g u and ∂²_cφ g u at φ, in one pass."""

    def inner_loss(params: Params, active: Context) -> Scalar:
        return problem.inner_loss(params, context.at(active))

    def both(params: Params) -> tuple[Params, Context]:
        gradients: tuple[Params, Context] = jax.grad(inner_loss, argnums=(0, 1))(
            params, context.active
        )
        return gradients

    try:
        (gradient, _), (hessian, mixed) = jax.jvp(both, (params,), (u,))
        return Products(gradient, hessian, mixed)
    except TypeError as error:
        _require_no_forward_rule(error)

    def along(params: Params, active: Context) -> tuple[Scalar, Params]:
        gradient = jax.grad(inner_loss)(params, active)
        return trees.dot(gradient, u), gradient

    by_both = jax.grad(along, argnums=(0, 1), has_aux=True)
    (hessian, mixed), gradient = by_both(params, context.active)
    return Products(gradient, hessian, mixed)


readable(__name__)
