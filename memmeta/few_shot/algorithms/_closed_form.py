"""Methods without an inner loop: what adapts is a closed form of the support features."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from memmeta import hypergradient
from memmeta._shared import checks
from memmeta.few_shot._closed_form import ridge_solution
from memmeta.few_shot._examples import Loss, are_classes, of_examples, query_mean
from memmeta.few_shot._head import HeadContext, augmented
from memmeta.few_shot._networks import Statistics, check_statistics, features_of
from memmeta.few_shot._tasks import check_tasks
from memmeta.few_shot.algorithms._learner import Learner, body_alone
from memmeta.inner import InnerLoop
from memmeta.models import Network
from memmeta.problem import MetaParams, Params, Problem, Scalar, Structure, Task, stacked

LOGITS_SCALE = 10.0


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
    outputs: Callable[[ClosedFormContext], Float[Array, "query ways"]],
    statistics: Statistics,
    loss: Loss | None,
) -> Problem:
    """The problem of a method whose query outputs are a function of the features; φ is empty."""
    check_statistics(statistics)
    vector = network.features is not None
    checks.require("network.features", network.features, vector, "features that are one vector")

    def embed(theta: MetaParams, task: Task) -> ClosedFormContext:
        support, query = features_of(network, theta["body"], task, statistics)
        others = {name: value for name, value in theta.items() if name != "body"}
        head = HeadContext(support, task.support_targets, query, task.query_targets)
        return ClosedFormContext(head, others)

    def inner_loss(params: Params, context: ClosedFormContext) -> Scalar:
        return jnp.zeros((), jnp.float32)

    def outer_loss(params: Params, context: ClosedFormContext) -> tuple[Scalar, Any]:
        targets = (context.head.query_targets, context.head.support_targets)
        return query_mean(of_examples(loss), outputs(context), *targets)

    structure = Structure(check=partial(check_tasks, network.ways, loss))
    return Problem(embed, inner_loss, outer_loss, lambda theta: (), structure=structure)


def r2d2(
    network: Network,
    *,
    ridge: float = 0.1,
    statistics: Statistics = "transductive",
    loss: Loss | None = None,
) -> Learner:
    r"""R2-D2: a ridge-regression head in closed form; its ridge and its logits' scale are learned.

    $$\Phi = \arg\min_\Phi \tfrac12 \|\tilde X \Phi - Y\|^2 / n + \tfrac\rho2 \|\Phi\|^2, \qquad
      \text{logits} = \alpha \tilde X' \Phi + \beta$$

    α starts at 10, as logits want; in regression the outputs are (α/10) X̃'Φ + β.

    Args:
        network: its body makes the features.
        ridge: where ρ starts, positive.
        statistics: which images give the batch statistics.
        loss: (outputs, targets) -> [examples], the loss of each example; None: cross-entropy of
            class indices, squared error of values.

    Returns:
        The learner; θ is {"body", "log_ridge", "scale", "shift"}.

    Raises:
        ValueError: `ridge` is not positive, or the network's features are no vector.

    Source: Bertinetto, Henriques, Torr, Vedaldi, "Meta-learning with differentiable closed-form
    solvers" (ICLR 2019), equations 4 and 6.

    Example:
        >>> from memmeta.models import conv4
        >>> learner = r2d2(conv4(ways=5, width=8))
        >>> learner.inner.steps
        0
    """
    checks.positive("ridge", ridge)

    def outputs(context: ClosedFormContext) -> Float[Array, "query ways"]:
        others = context.others
        head = ridge_solution(context.head, jnp.exp(others["log_ridge"]), network.ways)
        values = augmented(context.head.query_features) @ stacked(head)
        scale = others["scale"]
        if not are_classes(context.head.support_targets):
            scale = scale / LOGITS_SCALE
        logits: Array = scale * values + others["shift"]
        return logits

    def init(key: Key[Array, ""]) -> MetaParams:
        calibration = {"log_ridge": jnp.log(ridge), "scale": LOGITS_SCALE, "shift": 0.0}
        calibration = {name: jnp.float32(value) for name, value in calibration.items()}
        return {"body": network.init(key)["body"], **calibration}

    problem = closed_form_problem(network, outputs, statistics, loss)
    return Learner(problem, InnerLoop(steps=0), hypergradient.unrolled(), init)


def protonet(
    network: Network, *, statistics: Statistics = "transductive", loss: Loss | None = None
) -> Learner:
    r"""Prototypical networks: a query image belongs to the nearest class mean.

    $$\text{logits}_{jk} = -\|x'_j - m_k\|^2, \qquad
      m_k = \text{mean of the support features of class } k$$

    Args:
        network: its body makes the features.
        statistics: which images give the batch statistics.
        loss: (outputs, targets) -> [examples], the loss of each example; None: cross-entropy.

    Returns:
        The learner; θ is {"body": ...}.

    Raises:
        ValueError: (when traced) the targets are no class indices.

    Source: Snell, Swersky, Zemel, "Prototypical Networks for Few-shot Learning" (NeurIPS 2017).

    Example:
        >>> from memmeta.models import conv4
        >>> learner = protonet(conv4(ways=5, width=8))
    """

    def outputs(context: ClosedFormContext) -> Float[Array, "query ways"]:
        targets = context.head.support_targets
        if not are_classes(targets):
            raise ValueError(
                f"support_targets: protonet expects class indices, found {targets.dtype}"
                f"{list(targets.shape)}. Use another method for regression, such as maml or r2d2."
            )
        support, query = context.head.support_features, context.head.query_features
        members = jax.nn.one_hot(targets, network.ways, dtype=support.dtype)
        sizes = jnp.maximum(jnp.sum(members, axis=0), 1)[:, None]
        prototypes = members.T @ support / sizes
        squares = jnp.sum(query**2, axis=1)[:, None] + jnp.sum(prototypes**2, axis=1)
        logits: Array = 2 * query @ prototypes.T - squares
        return logits

    problem = closed_form_problem(network, outputs, statistics, loss)
    return Learner(problem, InnerLoop(steps=0), hypergradient.unrolled(), body_alone(network))
