r"""Methods that differentiate the inner solution: memory does not grow with the inner loop."""

from memmeta import hypergradient, linear_solve
from memmeta.few_shot._examples import Loss
from memmeta.few_shot._networks import Adapts, Statistics, head_problem, network_problem
from memmeta.few_shot.algorithms._learner import Learner, body_alone
from memmeta.inner import InnerLoop, gradient_descent
from memmeta.models import Network
from memmeta.problem import Params


def memory_reduced(
    network: Network,
    *,
    inner: InnerLoop = InnerLoop(steps=50),
    ridge: float = 0.1,
    cg_steps: int = 20,
    statistics: Statistics = "transductive",
    start: Params | None = None,
    loss: Loss | None = None,
) -> Learner:
    r"""The paper's method: a head per task, and the implicit hypergradient of the body.

    $$\nabla F_i = \partial_\theta f_i - \partial^2_{\theta\phi} g_i \, v_i, \qquad
      [\partial^2_{\phi\phi} g_i] v_i = \partial_\phi f_i$$

    Args:
        network: body (shared, θ) and head (per task, φ).
        inner: the inner loop.
        ridge: ρ of the head; makes g strongly convex, as the theory asks.
        cg_steps: conjugate-gradient steps, from zero.
        statistics: which images give the batch statistics.
        start: the head that every task starts from, never trained; None means zeros.
        loss: (outputs, targets) -> [examples], the loss of each example; None: cross-entropy of
            class indices, squared error of values.

    Returns:
        The learner; θ is {"body": ...}.

    Source: Yang, Ma, Yu, "Memory-Reduced Meta-Learning with Guaranteed Convergence" (AAAI 2025),
    Algorithm 1.

    Example:
        >>> import jax
        >>> from memmeta.models import conv4
        >>> learner = memory_reduced(conv4(ways=5, width=8))
        >>> sorted(learner.init(jax.random.key(0)))
        ['body']

        As released: a fixed random head, 20 steps at a constant rate, no ridge, two passes.

        >>> import optax
        >>> network = conv4(ways=5, width=8, head_scale=1.0)
        >>> learner = memory_reduced(
        ...     network,
        ...     inner=InnerLoop(optax.sgd(0.1), steps=20),
        ...     ridge=0.0,
        ...     cg_steps=20,
        ...     statistics="separate",
        ...     start=network.init(jax.random.key(1))["head"],
        ... )
    """
    problem = head_problem(
        network, ridge, learn_start=False, statistics=statistics, start=start, loss=loss
    )
    estimator = hypergradient.implicit(linear_solve.cg(cg_steps))
    return Learner(problem, inner, estimator, body_alone(network))


def imaml(
    network: Network,
    *,
    inner: InnerLoop = InnerLoop(gradient_descent(), steps=16),
    proximal: float = 2.0,
    cg_steps: int = 5,
    adapts: Adapts = "all",
    statistics: Statistics = "transductive",
    loss: Loss | None = None,
) -> Learner:
    r"""iMAML: every layer adapts, held to θ by a proximal term; no step is differentiated.

    $$\phi_i^* = \arg\min_\phi \ell_i(\phi) + \tfrac\lambda2 \|\phi - \theta\|^2, \qquad
      \nabla F_i = \big(I + \tfrac1\lambda \partial^2 \ell_i\big)^{-1} \partial_\phi f_i$$

    Args:
        network: body and head, both θ and φ.
        inner: the inner loop; the default measures the curvature and checks each step.
        proximal: λ. A batch-normalised network has negative curvature of its own: watch
            `report.smallest_curvature`, and raise λ where it is not positive.
        cg_steps: conjugate-gradient steps.
        adapts: which parameters do, "all" or part of them, see `memmeta.few_shot.network_problem`:
            the others are shared by all tasks.
        statistics: which images give the batch statistics of the query pass.
        loss: (outputs, targets) -> [examples], the loss of each example; None: cross-entropy of
            class indices, squared error of values.

    Returns:
        The learner; θ is the whole network.

    Source: Rajeswaran, Finn, Kakade, Levine (NeurIPS 2019), equations 3 and 6.

    Example:
        >>> from memmeta.models import conv4
        >>> imaml(conv4(ways=5, width=8, head_scale=1.0)).inner.steps
        16
    """
    problem = network_problem(network, adapts, proximal=proximal, statistics=statistics, loss=loss)
    estimator = hypergradient.implicit(linear_solve.cg(cg_steps))
    return Learner(problem, inner, estimator, network.init)


def stocbio(
    network: Network,
    *,
    inner: InnerLoop = InnerLoop(gradient_descent(), steps=20),
    ridge: float = 0.1,
    terms: int = 20,
    statistics: Statistics = "transductive",
    start: Params | None = None,
    loss: Loss | None = None,
) -> Learner:
    r"""stocBiO: as `memory_reduced`, with the Neumann series in place of conjugate gradients.

    $$v_i = \eta \sum_{k<Q} (I - \eta \, \partial^2_{\phi\phi} g_i)^k \, \partial_\phi f_i$$

    Args:
        network: body and head.
        inner: the inner loop.
        ridge: ρ of the head.
        terms: Q, of the series.
        statistics: which images give the batch statistics.
        start: the head that every task starts from, never trained; None means zeros.
        loss: (outputs, targets) -> [examples], the loss of each example; None: cross-entropy of
            class indices, squared error of values.

    Returns:
        The learner; θ is {"body": ...}.

    Source: Ji, Yang, Liang, "Bilevel Optimization: Convergence Analysis and Enhanced Design" (ICML
    2021), Algorithm 2; all support examples in each inner step, as few-shot tasks are small.

    Example:
        >>> from memmeta.models import conv4
        >>> learner = stocbio(conv4(ways=5, width=8))
    """
    problem = head_problem(
        network, ridge, learn_start=False, statistics=statistics, start=start, loss=loss
    )
    estimator = hypergradient.implicit(linear_solve.neumann(terms))
    return Learner(problem, inner, estimator, body_alone(network))


def amigo(
    network: Network,
    *,
    inner: InnerLoop = InnerLoop(gradient_descent(), steps=10),
    ridge: float = 0.1,
    cg_steps: int = 10,
    statistics: Statistics = "transductive",
    start: Params | None = None,
    loss: Loss | None = None,
) -> Learner:
    """AmIGO: few inner and few linear steps, each from the task's last φ_i and v_i.

    Warm starts need a finite set of tasks: wrap the meta-step in `memmeta.meta.WarmStart`. On
    fresh tasks every start is cold: `memory_reduced` with gradient descent and fewer steps.

    Args:
        network: body and head.
        inner: the inner loop.
        ridge: ρ of the head.
        cg_steps: conjugate-gradient steps.
        statistics: which images give the batch statistics.
        start: the head that every task starts from, never trained; None means zeros.
        loss: (outputs, targets) -> [examples], the loss of each example; None: cross-entropy of
            class indices, squared error of values.

    Returns:
        The learner; θ is {"body": ...}.

    Source: Arbel and Mairal, "Amortized Implicit Differentiation for Stochastic Bilevel
    Optimization" (ICLR 2022), Algorithm 1.

    Example:
        >>> import optax
        >>> from memmeta.models import conv4
        >>> from memmeta.meta import WarmStart
        >>> learner = amigo(conv4(ways=5, width=8))
        >>> step = WarmStart(learner.make_meta_step(optax.adam(1e-3)), size=100)
    """
    problem = head_problem(
        network, ridge, learn_start=False, statistics=statistics, start=start, loss=loss
    )
    estimator = hypergradient.implicit(linear_solve.cg(cg_steps))
    return Learner(problem, inner, estimator, body_alone(network))
