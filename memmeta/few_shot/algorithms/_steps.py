r"""Methods that differentiate through the inner steps."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Key

from memmeta import hypergradient
from memmeta._shared import checks, trees
from memmeta._shared.readable import named
from memmeta.few_shot._examples import Loss
from memmeta.few_shot._networks import (
    Adapts,
    NetworkContext,
    Statistics,
    head_problem,
    network_problem,
)
from memmeta.few_shot.algorithms._learner import Learner, body_alone
from memmeta.inner import InnerLoop, InnerSolver
from memmeta.models import Network
from memmeta.problem import MetaParams, Params, Problem, Scalar, Task


def maml(
    network: Network,
    *,
    inner: InnerLoop = InnerLoop(optax.sgd(0.4), steps=1),
    adapts: Adapts = "all",
    statistics: Statistics = "transductive",
    loss: Loss | None = None,
) -> Learner:
    """MAML: every layer adapts, from a learned start, and the steps are differentiated.

    Args:
        network: body and head, both θ and φ. Give the head a random start.
        inner: the inner loop, in training and, unless told otherwise, at test; by default one step
            of `optax.sgd(0.4)`. As the authors of `memory_reduced` ran it:
            `InnerLoop(optax.sgd(0.5), steps=3)`.
        adapts: which parameters do, "all" or part of them, see `memmeta.few_shot.network_problem`:
            the others are shared by all tasks.
        statistics: which images give the batch statistics of the query pass.
        loss: (outputs, targets) -> [examples], the loss of each example; None: cross-entropy of
            class indices, squared error of values.

    Returns:
        The learner; θ is the whole network.

    Source: Finn, Abbeel, Levine, "Model-Agnostic Meta-Learning" (ICML 2017).

    Example:
        >>> import jax
        >>> from memmeta.models import conv4
        >>> learner = maml(conv4(ways=5, width=8, head_scale=1.0))
        >>> sorted(learner.init(jax.random.key(0)))
        ['body', 'head']
    """
    problem = network_problem(network, adapts, proximal=0.0, statistics=statistics, loss=loss)
    return Learner(problem, inner, hypergradient.unrolled(), network.init)


def boil(
    network: Network,
    *,
    inner: InnerLoop = InnerLoop(optax.sgd(0.4), steps=1),
    statistics: Statistics = "transductive",
    loss: Loss | None = None,
) -> Learner:
    """BOIL: only the body adapts; the head is learned and stays as it is in every task.

    Args:
        network: body and head; only the body is φ.
        inner: the inner loop; by default one step of `optax.sgd(0.4)`.
        statistics: which images give the batch statistics of the query pass.
        loss: (outputs, targets) -> [examples], the loss of each example; None: cross-entropy of
            class indices, squared error of values.

    Returns:
        The learner; θ is the whole network.

    Source: Oh, Yoo, Kim, Yun, "BOIL: Towards Representation Change for Few-shot Learning" (ICLR
    2021).

    Example:
        >>> from memmeta.models import conv4
        >>> learner = boil(conv4(ways=5, width=8, head_scale=1.0))
    """
    problem = network_problem(network, "body", proximal=0.0, statistics=statistics, loss=loss)
    return Learner(problem, inner, hypergradient.unrolled(), network.init)


def anil(
    network: Network,
    *,
    inner: InnerLoop = InnerLoop(steps=10),
    ridge: float = 0.0,
    recompute_features: bool = False,
    statistics: Statistics = "transductive",
    loss: Loss | None = None,
) -> Learner:
    """ANIL: only the head adapts, from a learned start, on features computed once per task.

    Args:
        network: body and head.
        inner: the inner loop. As the authors of `memory_reduced` ran it, with "separate"
            statistics: `InnerLoop(optax.sgd(0.1), steps=10)`.
        ridge: weight of the head's ridge; 0 where features are recomputed.
        recompute_features: run the body in every inner step, as the authors' code does: with
            "separate" or "support" statistics the same numbers at many times the memory; give it
            `InnerLoop(optax.sgd(...))`.
        statistics: which images give the batch statistics.
        loss: (outputs, targets) -> [examples], the loss of each example; None: cross-entropy of
            class indices, squared error of values.

    Returns:
        The learner; θ is the whole network.

    Raises:
        ValueError: a ridge is asked for together with recomputed features, which have none.

    Source: Raghu, Raghu, Bengio, Vinyals, "Rapid Learning or Feature Reuse?" (ICLR 2020).

    Example:
        >>> from memmeta.models import conv4
        >>> learner = anil(conv4(ways=5, width=8, head_scale=1.0))
        >>> learner.inner.steps
        10
    """
    if recompute_features:
        checks.require("ridge", ridge, ridge == 0, "0 where features are recomputed")
        problem = network_problem(network, "head", proximal=0.0, statistics=statistics, loss=loss)
    else:
        problem = head_problem(network, ridge, learn_start=True, statistics=statistics, loss=loss)
    return Learner(problem, inner, hypergradient.unrolled(), network.init)


def itd_bio(
    network: Network,
    *,
    inner: InnerLoop = InnerLoop(steps=20),
    ridge: float = 0.0,
    recompute_features: bool = False,
    statistics: Statistics = "transductive",
    start: Params | None = None,
    loss: Loss | None = None,
) -> Learner:
    """ITD-BiO: as `memory_reduced`, with the inner steps differentiated.

    Args:
        network: body and head.
        inner: the inner loop. As the authors of `memory_reduced` ran it, with "separate"
            statistics and one random start: `InnerLoop(optax.sgd(0.1), steps=20)`.
        ridge: weight of the head's ridge; 0 where features are recomputed.
        recompute_features: as in `anil`.
        statistics: which images give the batch statistics.
        start: the head that every task starts from, never trained; None means zeros.
        loss: (outputs, targets) -> [examples], the loss of each example; None: cross-entropy of
            class indices, squared error of values.

    Returns:
        The learner; θ is {"body": ...}.

    Source: Ji, Yang, Liang (ICML 2021), Algorithm 1 with iterative differentiation.

    Example:
        >>> from memmeta.models import conv4
        >>> learner = itd_bio(conv4(ways=5, width=8))
    """
    if recompute_features:
        checks.require("ridge", ridge, ridge == 0, "0 where features are recomputed")
        problem = network_problem(network, "head", 0.0, statistics, start, loss=loss)
    else:
        problem = head_problem(network, ridge, False, statistics, start, loss)
    return Learner(problem, inner, hypergradient.unrolled(), body_alone(network))


@named
def learned_rates() -> InnerSolver:
    r"""Gradient steps with one rate a parameter, the context's `rates`: φ − α ⊙ ∇_φ g."""

    def update(
        problem: Problem,
        params: Params,
        state: None,
        context: NetworkContext,
        step: Array,
        key: Array,
    ) -> tuple[Params, None, Scalar]:
        gradient = jax.grad(problem.inner_loss)(params, context)
        following = jax.tree.map(lambda p, a, g: p - a * g, params, context.rates, gradient)
        return following, state, trees.norm(gradient)

    return InnerSolver(lambda problem, params, context: None, update)


def meta_sgd(
    network: Network,
    *,
    inner: InnerLoop = InnerLoop(learned_rates(), steps=1),
    first_rate: float = 0.4,
    statistics: Statistics = "transductive",
    loss: Loss | None = None,
) -> Learner:
    """Meta-SGD: MAML with one learned inner rate a parameter.

    Args:
        network: body and head, both θ and φ.
        inner: the inner loop, made of `learned_rates`.
        first_rate: where every rate starts.
        statistics: which images give the batch statistics of the query pass.
        loss: (outputs, targets) -> [examples], the loss of each example; None: cross-entropy of
            class indices, squared error of values.

    Returns:
        The learner; θ is the whole network and its "rates".

    Source: Li, Zhou, Chen, Li, "Meta-SGD: Learning to Learn Quickly for Few-Shot Learning" (2017),
    equation 1.

    Example:
        >>> from memmeta.models import conv4
        >>> learner = meta_sgd(conv4(ways=5, width=8, head_scale=1.0))
        >>> sorted(learner.init(jax.random.key(0)))
        ['body', 'head', 'rates']
    """
    base = network_problem(network, "all", proximal=0.0, statistics=statistics, loss=loss)

    def parts(theta: MetaParams) -> MetaParams:
        return {"body": theta["body"], "head": theta["head"]}

    def embed(theta: MetaParams, task: Task) -> NetworkContext:
        context: NetworkContext = base.embed(parts(theta), task)
        return context._replace(rates=theta["rates"])

    def init(key: Key[Array, ""]) -> dict[str, Any]:
        theta = network.init(key)
        return {**theta, "rates": jax.tree.map(lambda p: jnp.full_like(p, first_rate), theta)}

    problem = replace(base, embed=embed, init=lambda theta: base.init(parts(theta)))
    return Learner(problem, inner, hypergradient.unrolled(), init)
