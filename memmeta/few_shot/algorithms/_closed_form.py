"""Methods without an inner loop: what adapts is a closed form of the support features."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from memmeta import _checks, hypergradient
from memmeta.few_shot._closed_form import ridge_solution
from memmeta.few_shot._head import HeadContext, augmented
from memmeta.few_shot._networks import Statistics, check_statistics, features_of, query_loss
from memmeta.few_shot.algorithms._learner import Learner, body_alone
from memmeta.inner import InnerLoop
from memmeta.models import Network
from memmeta.problem import MetaParams, Params, Problem, Scalar, Task, stacked


class ClosedFormContext(NamedTuple):
    """Features and targets of a task, and the meta-parameters outside the body.

    Attributes:
        head: see `memmeta.few_shot.HeadContext`.
        others: θ without its "body".
    """

    head: HeadContext
    others: MetaParams


def closed_form_problem(
    network: Network,
    logits: Callable[[ClosedFormContext], Float[Array, "query ways"]],
    statistics: Statistics,
) -> Problem:
    """The problem of a method whose query logits are a function of the features; φ is empty."""
    check_statistics(statistics)

    def embed(theta: MetaParams, task: Task) -> ClosedFormContext:
        support, query = features_of(network, theta["body"], task, statistics)
        others = {name: value for name, value in theta.items() if name != "body"}
        head = HeadContext(support, task.support_targets, query, task.query_targets)
        return ClosedFormContext(head, others)

    def inner_loss(params: Params, context: ClosedFormContext) -> Scalar:
        return jnp.float32(0)

    def outer_loss(params: Params, context: ClosedFormContext) -> tuple[Scalar, Any]:
        return query_loss(logits(context), context.head.query_targets)

    return Problem(embed, inner_loss, outer_loss, lambda theta: ())


def r2d2(
    network: Network, *, ridge: float = 0.1, statistics: Statistics = "transductive"
) -> Learner:
    r"""R2-D2: a ridge-regression head in closed form; its ridge and its logits' scale are learned.

    $$\Phi = \arg\min_\Phi \tfrac12 \|\tilde X \Phi - Y\|^2 / n + \tfrac\rho2 \|\Phi\|^2, \qquad
      \text{logits} = \alpha \tilde X' \Phi + \beta$$

    Args:
        network: its body makes the features.
        ridge: where ρ starts, positive.
        statistics: which images give the batch statistics.

    Returns:
        The learner; θ is {"body", "log_ridge", "scale", "shift"}.

    Raises:
        ValueError: `ridge` is not positive.

    Source: Bertinetto, Henriques, Torr, Vedaldi, "Meta-learning with differentiable closed-form
    solvers" (ICLR 2019), equations 4 and 6.

    Example:
        >>> from memmeta.models import conv4
        >>> learner = r2d2(conv4(ways=5, width=8))
        >>> learner.inner.steps
        0
    """
    _checks.positive("ridge", ridge)

    def logits(context: ClosedFormContext) -> Float[Array, "query ways"]:
        others = context.others
        head = ridge_solution(context.head, jnp.exp(others["log_ridge"]), network.ways)
        values = augmented(context.head.query_features) @ stacked(head)
        return others["scale"] * values + others["shift"]

    def init(key: Key[Array, ""]) -> MetaParams:
        calibration = {"log_ridge": jnp.log(ridge), "scale": 10.0, "shift": 0.0}
        calibration = {name: jnp.float32(value) for name, value in calibration.items()}
        return {"body": network.init(key)["body"], **calibration}

    problem = closed_form_problem(network, logits, statistics)
    return Learner(problem, InnerLoop(steps=0), hypergradient.unrolled(), init)


def protonet(network: Network, *, statistics: Statistics = "transductive") -> Learner:
    r"""Prototypical networks: a query image belongs to the nearest class mean. The reference.

    $$\text{logits}_{jk} = -\|x'_j - m_k\|^2, \qquad
      m_k = \text{mean of the support features of class } k$$

    Args:
        network: its body makes the features.
        statistics: which images give the batch statistics.

    Returns:
        The learner; θ is {"body": ...}.

    Source: Snell, Swersky, Zemel, "Prototypical Networks for Few-shot Learning" (NeurIPS 2017).

    Example:
        >>> from memmeta.models import conv4
        >>> learner = protonet(conv4(ways=5, width=8))
    """

    def logits(context: ClosedFormContext) -> Float[Array, "query ways"]:
        support, query = context.head.support_features, context.head.query_features
        members = jax.nn.one_hot(context.head.support_targets, network.ways, dtype=support.dtype)
        sizes = jnp.maximum(jnp.sum(members, axis=0), 1)[:, None]
        prototypes = members.T @ support / sizes
        squares = jnp.sum(query**2, axis=1)[:, None] + jnp.sum(prototypes**2, axis=1)
        return 2 * query @ prototypes.T - squares

    problem = closed_form_problem(network, logits, statistics)
    return Learner(problem, InnerLoop(steps=0), hypergradient.unrolled(), body_alone(network))
