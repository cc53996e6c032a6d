r"""The literature's methods, each a few lines: who adapts × inner loop × estimator."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import optax
from jaxtyping import Array, Key

from memmeta import hypergradient, linear_solve
from memmeta.evaluate import Evaluation, evaluate
from memmeta.few_shot import Statistics, head_problem, network_problem
from memmeta.hypergradient import Estimator
from memmeta.inner import InnerLoop
from memmeta.meta_step import MetaStep, make_meta_step
from memmeta.models import Network
from memmeta.problem import Batch, MetaParams, Problem


@dataclass(frozen=True)
class Learner:
    """A few-shot method: a problem, an inner loop, an estimator, and a start.

    Attributes:
        problem: who adapts, and to what losses.
        inner: the inner loop of training.
        estimator: of the hypergradient.
        init: PRNG key -> θ.
    """

    problem: Problem
    inner: InnerLoop
    estimator: Estimator
    init: Callable[[Key[Array, ""]], MetaParams]

    def make_meta_step(
        self, optimizer: optax.GradientTransformation, *, task_chunk: int | None = None
    ) -> MetaStep:
        """`memmeta.make_meta_step` with this method's problem, inner loop and estimator."""
        return make_meta_step(
            self.problem, self.inner, self.estimator, optimizer, task_chunk=task_chunk
        )

    def evaluate(
        self,
        meta_params: MetaParams,
        tasks: Batch,
        *,
        inner: InnerLoop | None = None,
        task_chunk: int | None = None,
    ) -> Evaluation:
        """`memmeta.evaluate` with this method's problem; by default with the loop of training."""
        return evaluate(self.problem, inner or self.inner, meta_params, tasks, task_chunk)


def _whole(network: Network) -> Callable[[Key[Array, ""]], MetaParams]:
    return network.init


def _body(network: Network) -> Callable[[Key[Array, ""]], MetaParams]:
    return lambda key: {"body": network.init(key)["body"]}


def memory_reduced(
    network: Network,
    *,
    inner: InnerLoop = InnerLoop(steps=50),
    ridge: float = 0.1,
    cg_steps: int = 20,
    statistics: Statistics = "transductive",
) -> Learner:
    r"""The paper's method: a head per task, and the implicit hypergradient of the body.

    $$\nabla F_i = \partial_\theta f_i - \partial^2_{\theta\phi} g_i \, v_i, \qquad
      [\partial^2_{\phi\phi} g_i] v_i = \partial_\phi f_i$$

    Args:
        network: body (shared, θ) and head (per task, φ; always started from zero).
        inner: the inner loop. As released: `InnerLoop(optax.sgd(0.1), steps=20)`.
        ridge: ρ of the head; makes g strongly convex, as the theory asks. As released: 0.
        cg_steps: conjugate-gradient steps, from zero.
        statistics: which images give the batch statistics.

    Returns:
        The learner; θ is {"body": ...}.

    Source: Yang, Ma, Yu, "Memory-Reduced Meta-Learning with Guaranteed Convergence" (AAAI 2025),
    Algorithm 1.

    Example:
        >>> from memmeta.models import conv4
        >>> learner = memory_reduced(conv4(ways=5, width=8))
        >>> sorted(learner.init(jax.random.key(0)))
        ['body']
    """
    problem = head_problem(network, ridge, learn_start=False, statistics=statistics)
    estimator = hypergradient.implicit(linear_solve.cg(cg_steps))
    return Learner(problem, inner, estimator, _body(network))


def maml(
    network: Network,
    *,
    inner: InnerLoop = InnerLoop(optax.sgd(0.4), steps=1),
    statistics: Statistics = "transductive",
) -> Learner:
    """MAML: every layer adapts, from a learned start, and the steps are differentiated.

    Args:
        network: body and head, both θ and φ. Give the head a random start.
        inner: the inner loop, in training and, unless told otherwise, at test.
        statistics: which images give the batch statistics of the query pass.

    Returns:
        The learner; θ is the whole network.

    Source: Finn, Abbeel, Levine, "Model-Agnostic Meta-Learning" (ICML 2017).

    Example:
        >>> from memmeta.models import conv4
        >>> learner = maml(conv4(ways=5, width=8, head_scale=1.0))
        >>> sorted(learner.init(jax.random.key(0)))
        ['body', 'head']
    """
    problem = network_problem(network, "all", proximal=0.0, statistics=statistics)
    return Learner(problem, inner, hypergradient.unrolled(), _whole(network))


def anil(
    network: Network,
    *,
    inner: InnerLoop = InnerLoop(steps=10),
    ridge: float = 0.0,
    statistics: Statistics = "transductive",
) -> Learner:
    """ANIL: only the head adapts, from a learned start, on features computed once per task.

    Args:
        network: body and head.
        inner: the inner loop. As the paper's authors ran it: `InnerLoop(optax.sgd(0.1), steps=10)`.
        ridge: weight of the head's ridge.
        statistics: which images give the batch statistics.

    Returns:
        The learner; θ is the whole network.

    Source: Raghu, Raghu, Bengio, Vinyals, "Rapid Learning or Feature Reuse?" (ICLR 2020).

    Example:
        >>> from memmeta.models import conv4
        >>> learner = anil(conv4(ways=5, width=8, head_scale=1.0))
        >>> learner.inner.steps
        10
    """
    problem = head_problem(network, ridge, learn_start=True, statistics=statistics)
    return Learner(problem, inner, hypergradient.unrolled(), _whole(network))


Name: TypeAlias = Literal["memory_reduced", "maml", "anil"]
METHODS: dict[str, Callable[..., Learner]] = {
    method.__name__: method for method in (memory_reduced, maml, anil)
}
"""Every method by its name in the literature."""
FIXED_START = {"memory_reduced"}
"""Methods whose heads start from zero instead of from meta-parameters."""
