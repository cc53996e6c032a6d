"""What a bilevel problem is: four pure functions; and the few-shot task they are most often fed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from jaxtyping import Array, Float, PyTree, Shaped

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
    """A few-shot task: examples to adapt on (support) and examples to be judged on (query).

    Attributes:
        support_inputs: [support, ...] examples, any dtype (images are uint8 until the network).
        support_targets: [support, ...] class indices (int32) or regression targets (float).
        query_inputs: [query, ...] examples.
        query_targets: [query, ...] class indices or regression targets. A class index of -1, here
            and above, marks padding: no loss, no statistic and no accuracy takes notice of it.
    """

    support_inputs: Shaped[Array, "*support"]
    support_targets: Shaped[Array, "*support_targets"]
    query_inputs: Shaped[Array, "*query"]
    query_targets: Shaped[Array, "*query_targets"]


class Constants(NamedTuple):
    r"""How fast the derivatives of one task's losses can change, in Euclidean and operator norms.

    Each holds for every φ within a radius of a given point; see `memmeta.certificate`.

    Attributes:
        outer_context: Lipschitz constant of ∂_c f in φ.
        outer_params: Lipschitz constant of ∂_φ f in φ.
        mixed: Lipschitz constant of ∂²_cφ g in φ.
        hessian: Lipschitz constant of ∂²_φφ g in φ.
        coupling: bound on ‖∂²_cφ g‖.
        embedding: bound on ‖∂c/∂θ‖, to bound errors of the gradient in θ; 1 for errors in c.
    """

    outer_context: Scalar
    outer_params: Scalar
    mixed: Scalar
    hessian: Scalar
    coupling: Scalar
    embedding: Scalar


class Deviations(NamedTuple):
    r"""How far one task's derivatives at φ̂ can be from those at φ*, v̂ held fixed.

    With $M = \partial^2_{c\phi} g$ and $H = \partial^2_{\phi\phi} g$, a hat for values at φ̂ and a
    star for those at φ*. What `Constants` bound by products, a problem that knows its structure can
    bound together, and more sharply.

    Attributes:
        outer_context: bound on ‖∂_c f(φ̂) − ∂_c f(φ*)‖.
        outer_params: bound on ‖∂_φ f(φ̂) − ∂_φ f(φ*)‖.
        mixed: bound on ‖(M̂ − M*) v̂‖.
        hessian: bound on ‖M* H*⁻¹ (Ĥ − H*) v̂‖.
        sensitivity: bound on ‖M* H*⁻¹‖ = ‖∂φ*/∂c‖.
        embedding: as in `Constants`.
    """

    outer_context: Scalar
    outer_params: Scalar
    mixed: Scalar
    hessian: Scalar
    sensitivity: Scalar
    embedding: Scalar


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
            inner solvers measure the curvature and check every step.
        strong_convexity: context -> μ with ∂²_φφ g ⪰ μ·I for every φ. Optional: a ridge or a
            proximal term gives it. Certificates are rigorous only with it.
        head: context -> `memmeta.linear_head.LinearHead`, where the losses are those of a linear
            head. Optional: it lets solvers and estimators work in the space of the samples.
        constants: (φ, radius, context) -> `Constants` valid within that distance of φ. Optional:
            with it and `strong_convexity` every implicit hypergradient has a rigorous error bound.
        deviations: (problem, φ̂, v̂, radius, context) -> `Deviations` for every φ* within that
            distance of φ̂, from the losses and μ of the problem it is given. Optional: a sharper
            bound than that of the constants.

    Example:
        >>> import jax.numpy as jnp
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
    head: Callable[[Context], Any] | None = None
    constants: Callable[[Params, Scalar, Context], Constants] | None = None
    deviations: Callable[[Any, Params, Params, Scalar, Context], Deviations] | None = None
