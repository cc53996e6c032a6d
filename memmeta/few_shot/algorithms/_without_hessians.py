"""Methods that spare the second derivatives."""

import optax

from memmeta import hypergradient
from memmeta.few_shot._examples import Loss
from memmeta.few_shot._networks import Adapts, Statistics, head_problem, network_problem
from memmeta.few_shot.algorithms._learner import Learner, body_alone
from memmeta.inner import InnerLoop
from memmeta.models import Network
from memmeta.problem import Params


def fomaml(
    network: Network,
    *,
    inner: InnerLoop = InnerLoop(optax.sgd(0.4), steps=1),
    adapts: Adapts = "all",
    statistics: Statistics = "transductive",
    loss: Loss | None = None,
) -> Learner:
    """First-order MAML: the query gradient at the adapted parameters, taken as that at θ.

    Args:
        network: body and head, both θ and φ.
        inner: the inner loop.
        adapts: which parameters do, "all" or part of them, see `memmeta.few_shot.network_problem`:
            the others are shared by all tasks.
        statistics: which images give the batch statistics of the query pass.
        loss: (outputs, targets) -> [examples], the loss of each example; None: cross-entropy of
            class indices, squared error of values.

    Returns:
        The learner; θ is the whole network.

    Source: Finn, Abbeel, Levine (ICML 2017), section 5.2.

    Example:
        >>> from memmeta.models import conv4
        >>> learner = fomaml(conv4(ways=5, width=8, head_scale=1.0))
    """
    problem = network_problem(network, adapts, proximal=0.0, statistics=statistics, loss=loss)
    return Learner(problem, inner, hypergradient.first_order(), network.init)


def reptile(
    network: Network,
    *,
    inner: InnerLoop = InnerLoop(optax.sgd(0.1), steps=5),
    adapts: Adapts = "all",
    statistics: Statistics = "transductive",
    loss: Loss | None = None,
) -> Learner:
    """Reptile: θ moves towards the adapted parameters; the query examples are evaluated only.

    Args:
        network: body and head, both θ and φ.
        inner: the inner loop.
        adapts: which parameters do, "all" or part of them, see `memmeta.few_shot.network_problem`:
            the others are shared by all tasks.
        statistics: which images give the batch statistics of the query pass.
        loss: (outputs, targets) -> [examples], the loss of each example; None: cross-entropy of
            class indices, squared error of values.

    Returns:
        The learner; θ is the whole network.

    Source: Nichol, Achiam, Schulman, "On First-Order Meta-Learning Algorithms" (2018), Algorithm 2.

    Example:
        >>> from memmeta.models import conv4
        >>> learner = reptile(conv4(ways=5, width=8, head_scale=1.0))
    """
    problem = network_problem(network, adapts, proximal=0.0, statistics=statistics, loss=loss)
    return Learner(problem, inner, hypergradient.reptile(), network.init)


def pzobo(
    network: Network,
    *,
    inner: InnerLoop = InnerLoop(steps=20),
    ridge: float = 0.1,
    directions: int = 1,
    statistics: Statistics = "transductive",
    start: Params | None = None,
    loss: Loss | None = None,
) -> Learner:
    """PZOBO: the response of the inner solution to θ by finite differences along random directions.

    Args:
        network: body and head.
        inner: the inner loop.
        ridge: weight of the head's ridge.
        directions: random directions a meta-step.
        statistics: which images give the batch statistics.
        start: the head that every task starts from, never trained; None means zeros.
        loss: (outputs, targets) -> [examples], the loss of each example; None: cross-entropy of
            class indices, squared error of values.

    Returns:
        The learner; θ is {"body": ...}.

    Source: Sow, Ji, Liang, "On the Convergence Theory for Hessian-Free Bilevel Algorithms" (NeurIPS
    2022), Algorithm 1.

    Example:
        >>> from memmeta.models import conv4
        >>> learner = pzobo(conv4(ways=5, width=8))
    """
    problem = head_problem(
        network, ridge, learn_start=False, statistics=statistics, start=start, loss=loss
    )
    estimator = hypergradient.finite_difference(directions)
    return Learner(problem, inner, estimator, body_alone(network))
