r"""Few-shot learning as a bilevel problem: which parameters of a network adapt to a task.

Who adapts is one choice; how (the inner loop) and how the hypergradient is found (the estimator)
are two others, made elsewhere and independent of it.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from memmeta import _checks, trees
from memmeta.few_shot._examples import cross_entropies, judged, present, weighted_mean
from memmeta.few_shot._head import HeadContext
from memmeta.few_shot._losses import softmax_problem
from memmeta.models import Network, linear_head
from memmeta.problem import MetaParams, Params, Problem, Scalar, Task

Statistics: TypeAlias = Literal["transductive", "support"]
"""Which images give the batch statistics of the query pass: "transductive" uses the query images
(for cached features: support and query together, as the paper's authors do), "support" only the
support images, so that each query image is judged alone."""

Adapts: TypeAlias = Literal["head", "body", "all"] | Callable[[str], bool]
"""Who adapts: a part of the network, or a predicate on paths such as "body/Conv_0/kernel"."""


class NetworkContext(NamedTuple):
    """What the inner loop of a network does not change.

    Attributes:
        rest: parameters that do not adapt (None where a leaf does).
        anchor: where the proximal term pulls the adapting parameters to; None without one.
        task: support and query examples.
        rates: one inner rate a parameter, for methods that learn them; None otherwise.
    """

    rest: PyTree
    anchor: PyTree | None
    task: Task
    rates: PyTree | None = None


def features_of(
    network: Network, body: Params, task: Task, statistics: Statistics
) -> tuple[Float[Array, "support features"], Float[Array, "query features"]]:
    """The features of a task's support and query examples, in one pass through the body.

    Args:
        network: the network.
        body: its body's parameters.
        task: one task; padding takes no part in the batch statistics.
        statistics: see `Statistics`.

    Returns:
        Support features and query features.
    """
    support = task.support_inputs.shape[0]
    inputs = jnp.concatenate([task.support_inputs, task.query_inputs])
    weights = jnp.concatenate([present(task.support_targets), present(task.query_targets)])
    if statistics == "support":
        weights = weights.at[support:].set(0)
    features = network.body(body, inputs, weights)
    return features[:support], features[support:]


def head_problem(
    network: Network, ridge: float, learn_start: bool, statistics: Statistics = "transductive"
) -> Problem:
    r"""The head adapts, on features computed once per task.

    $$g = \tfrac1n \sum_j \ell(h_\phi(x_j), y_j) + \tfrac{\rho}{2} \|\phi\|^2, \qquad
      f = \tfrac1m \sum_j \ell(h_\phi(x'_j), y'_j)$$

    with x = body(θ, images). θ is {"body": ...}, and {"head": ...} too where its start is learned;
    otherwise every head starts from zero.

    Args:
        network: body and head. A linear head gets its curvature bound in closed form.
        ridge: ρ, the weight of the ridge. Zero is the algorithm as its authors released it; the
            head's Hessian is then singular and the guarantees are void.
        learn_start: whether the head's start is a meta-parameter (as in ANIL).
        statistics: see `Statistics`.

    Returns:
        The problem; its context is a `HeadContext`.

    Raises:
        ValueError: `ridge` is negative.
    """
    _checks.not_negative("ridge", ridge)

    def embed(theta: MetaParams, task: Task) -> HeadContext:
        support, query = features_of(network, theta["body"], task, statistics)
        return HeadContext(support, task.support_targets, query, task.query_targets)

    def init(theta: MetaParams) -> Params:
        if learn_start:
            return theta["head"]
        return jax.tree.map(
            lambda shape: jnp.zeros(shape.shape, shape.dtype),
            jax.eval_shape(network.init, jax.random.key(0))["head"],
        )

    if network.head is linear_head:
        return softmax_problem(embed, init, ridge)

    def inner_loss(head: Params, context: HeadContext) -> Scalar:
        logits = network.head(head, context.support_features)
        return support_loss(logits, context.support_targets) + _half_square(ridge, head)

    def outer_loss(head: Params, context: HeadContext) -> tuple[Scalar, Any]:
        return query_loss(network.head(head, context.query_features), context.query_targets)

    return Problem(embed, inner_loss, outer_loss, init)


def support_loss(logits: Float[Array, "support ways"], targets: Int[Array, " support"]) -> Scalar:
    """Mean cross-entropy; padding does not count.

    Example:
        >>> round(float(support_loss(jnp.zeros((2, 2)), jnp.array([0, -1]))), 4)
        0.6931
    """
    return weighted_mean(cross_entropies(logits, targets), present(targets))


def query_loss(
    logits: Float[Array, "query ways"], targets: Int[Array, " query"]
) -> tuple[Scalar, dict[str, Scalar]]:
    """Mean cross-entropy, and {"accuracy": share of the query examples classified rightly}."""
    return judged(cross_entropies, logits, targets)


def network_problem(
    network: Network, adapts: Adapts, proximal: float, statistics: Statistics = "transductive"
) -> Problem:
    r"""Any part of the network adapts, through the network at each inner step.

    $$g = \tfrac1n \sum_j \ell(h_\phi(x_j), y_j) + \tfrac{\lambda}{2} \|\phi - \theta\|^2$$

    The inner loop starts at θ; a head that θ does not have starts from zero.

    Args:
        network: body and head.
        adapts: which parameters adapt, see `Adapts`.
        proximal: λ, how strongly φ is held to θ (0 for MAML, positive for iMAML).
        statistics: see `Statistics`. The inner loss always uses the support's own.

    Returns:
        The problem; its context is a `NetworkContext`.

    Raises:
        ValueError: `proximal` is negative, or no parameter adapts.
    """
    _checks.not_negative("proximal", proximal)
    mask = _mask(network, adapts)

    shapes = jax.eval_shape(network.init, jax.random.key(0))

    def parts(theta: MetaParams) -> tuple[PyTree, PyTree]:
        head = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes["head"])
        return trees.split({"head": head, **theta}, mask)

    def embed(theta: MetaParams, task: Task) -> NetworkContext:
        chosen, rest = parts(theta)
        return NetworkContext(rest, chosen if proximal else None, task)

    def inner_loss(params: Params, context: NetworkContext) -> Scalar:
        network_params = trees.merge(params, context.rest)
        images = context.task.support_inputs
        weights = present(context.task.support_targets)
        features = network.body(network_params["body"], images, weights)
        logits = network.head(network_params["head"], features)
        loss = support_loss(logits, context.task.support_targets)
        if context.anchor is None:
            return loss
        return loss + _half_square(proximal, jax.tree.map(jnp.subtract, params, context.anchor))

    def outer_loss(params: Params, context: NetworkContext) -> tuple[Scalar, Any]:
        network_params = trees.merge(params, context.rest)
        images = context.task.query_inputs
        if statistics == "support":
            _, features = features_of(network, network_params["body"], context.task, "support")
        else:
            weights = present(context.task.query_targets)
            features = network.body(network_params["body"], images, weights)
        logits = network.head(network_params["head"], features)
        return query_loss(logits, context.task.query_targets)

    return Problem(embed, inner_loss, outer_loss, lambda theta: parts(theta)[0])


def _mask(network: Network, adapts: Adapts) -> PyTree[bool]:
    shapes = jax.eval_shape(network.init, jax.random.key(0))

    def chosen(path: tuple, _: Any) -> bool:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if callable(adapts):
            return bool(adapts(name))
        return adapts == "all" or name.split("/")[0] == adapts

    mask = jax.tree_util.tree_map_with_path(chosen, shapes)
    if not any(jax.tree.leaves(mask)):
        names = [
            jax.tree_util.keystr(path, simple=True, separator="/")
            for path, _ in jax.tree_util.tree_leaves_with_path(shapes)
        ]
        raise ValueError(
            f"adapts: {adapts!r} chooses no parameter. Expected 'head', 'body', 'all' or a "
            f"predicate that is true for some of: {', '.join(names)}."
        )
    return mask


def _half_square(weight: float, tree: PyTree) -> Scalar:
    squares = [jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)]
    return 0.5 * weight * sum(squares[1:], squares[0])
