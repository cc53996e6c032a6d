r"""Few-shot learning as a bilevel problem: which parameters of a network adapt to a task.

The inner loop and the estimator are chosen elsewhere and do not depend on it.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, PyTree

from memmeta._shared import checks, trees
from memmeta.few_shot._examples import Loss, of_examples, present, query_mean, support_mean
from memmeta.few_shot._head import HeadContext
from memmeta.few_shot._losses import linear_head_problem
from memmeta.few_shot._tasks import check_tasks
from memmeta.models import Network, linear_head
from memmeta.models._network import Features
from memmeta.problem import Composite, MetaParams, Params, Problem, Scalar, Structure, Task

Statistics: TypeAlias = Literal["transductive", "support", "separate"]
"""Which images give the batch statistics. "support": the support images, for both parts alike, so
that each query image is classified by itself. "separate": support images for support and query
images for query, in two passes, as in the code that the paper's authors released. "transductive":
both together, in one pass, where features are computed once; where the body adapts, as
"separate"."""

Adapts: TypeAlias = (
    Literal["head", "body", "all"] | Callable[[str], bool] | Callable[[str], str] | PyTree[str]
)
"""A part of the network; a function of paths of parameters such as "body/Conv_0/kernel"; or a tree
of labels, as in `optax.multi_transform`, like what the network's `init` gives or like a part of it:
a label stands for all below it, and what the tree leaves out is shared. The function gives a bool
or a label. Labels are "adapts" (φ) and "shared" (θ alone, the same for all tasks)."""
LABELS = ("adapts", "shared")


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


def key_of(task: Task, part: Literal["support", "query"]) -> Key[Array, ""] | None:
    """What a pass over a part of the task draws its noise of, the same in every inner step.

    A new one in each step would make g another function at each: no rule for its minimiser, and no
    step size, holds for that.
    """
    key = task.extras.get("key") if isinstance(task.extras, dict) else None
    return None if key is None else jax.random.fold_in(key, ("support", "query").index(part))


def features_of(
    network: Network, body: Params, task: Task, statistics: Statistics
) -> tuple[Features, Features]:
    """The features of a task's support and query examples."""
    inputs = (task.support_inputs, task.query_inputs)
    weights = (present(task.support_targets), present(task.query_targets))
    keys = (key_of(task, "support"), key_of(task, "query"))
    if statistics == "separate":
        support, query = zip(inputs, weights, keys, strict=True)
        return network.noisy_body(body, *support), network.noisy_body(body, *query)
    if statistics == "support":
        weights = (weights[0], jnp.zeros_like(weights[1]))
    both = jax.tree.map(lambda *parts: jnp.concatenate(parts), *inputs)
    features = network.noisy_body(body, both, jnp.concatenate(weights), keys[0])
    count = weights[0].shape[0]
    return jax.tree.map(lambda x: x[:count], features), jax.tree.map(lambda x: x[count:], features)


def check_statistics(statistics: Any) -> None:
    """Refuse what is none of `Statistics`.

    Example:
        >>> check_statistics("running")
        Traceback (most recent call last):
        ValueError: statistics: expected one of 'transductive', 'support', 'separate'...
    """
    checks.one_of("statistics", statistics, get_args(Statistics))


def fixed_start(network: Network, start: Params | None) -> Callable[[], Params]:
    """The head that every task starts from: `start`, or zeros.

    Raises:
        ValueError: `start` has not the structure and shapes of the network's head.
    """
    head = jax.eval_shape(network.init, jax.random.key(0))["head"]
    if start is None:
        return lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), head)
    expected, found = (jax.tree.map(jnp.shape, tree) for tree in (head, start))
    remedy = 'Give a head such as network.init(key)["head"], or None for zeros.'
    checks.require("start", found, found == expected, f"a head of shapes {expected}", remedy)
    return lambda: start


def head_problem(
    network: Network,
    ridge: float,
    learn_start: bool,
    statistics: Statistics = "transductive",
    start: Params | None = None,
    loss: Loss | None = None,
) -> Problem:
    r"""The head adapts, on features computed once per task.

    $$g = \tfrac1n \sum_j \ell(h_\phi(x_j), y_j) + \tfrac{\rho}{2} \|\phi\|^2, \qquad
      f = \tfrac1m \sum_j \ell(h_\phi(x'_j), y'_j)$$

    with x = body(θ, images). θ is {"body": ...}, and {"head": ...} too where its start is learned;
    otherwise every head starts from `start`.

    Args:
        network: body and head. A linear head gets its curvature bound in closed form.
        ridge: ρ, the weight of the ridge. Zero is the algorithm as its authors released it; the
            head's Hessian is then singular and the guarantees are void.
        learn_start: whether the head's start is a meta-parameter (as in ANIL).
        statistics: see `Statistics`.
        start: a head like `network.init(key)["head"]`, the same for all tasks and never trained;
            None means zeros. Not read where the start is learned.
        loss: of each example, see `Loss`; None takes cross-entropies of integer targets (over the
            classes that the task has) and half the squared error of floating-point ones.

    Returns:
        The problem; its context is a `HeadContext`.

    Raises:
        ValueError: `ridge` is negative, `statistics` has another name, or `start` does not fit.
    """
    checks.not_negative("ridge", ridge)
    check_statistics(statistics)
    fixed = fixed_start(network, start)

    def embed(theta: MetaParams, task: Task) -> HeadContext:
        support, query = features_of(network, theta["body"], task, statistics)
        return HeadContext(support, task.support_targets, query, task.query_targets)

    def init(theta: MetaParams) -> Params:
        return theta["head"] if learn_start else fixed()

    check = partial(check_tasks, network.ways, loss)
    if network.head is linear_head and loss is None:
        problem = linear_head_problem(embed, init, ridge)
        return replace(problem, structure=replace(problem.structure, check=check))
    losses = of_examples(loss)

    def composite(context: HeadContext) -> Composite:
        return Composite(
            lambda head: network.head(head, context.support_features),
            lambda outputs: support_mean(losses, outputs, context.support_targets),
            ridge,
        )

    def inner_loss(head: Params, context: HeadContext) -> Scalar:
        fit = composite(context)
        return fit.loss(fit.outputs(head)) + half_square(ridge, head)

    def outer_loss(head: Params, context: HeadContext) -> tuple[Scalar, Any]:
        outputs = network.head(head, context.query_features)
        return query_mean(losses, outputs, context.query_targets, context.support_targets)

    # of a user's loss it is not known whether it is convex in the outputs
    structure = Structure(check=check, composite=composite if loss is None else None)
    return Problem(embed, inner_loss, outer_loss, init, structure=structure)


def network_problem(
    network: Network,
    adapts: Adapts,
    proximal: float,
    statistics: Statistics = "transductive",
    start: Params | None = None,
    loss: Loss | None = None,
) -> Problem:
    r"""Any part of the network adapts, through the network at each inner step.

    $$g = \tfrac1n \sum_j \ell(h_\phi(x_j), y_j) + \tfrac{\lambda}{2} \|\phi - \theta\|^2$$

    The inner loop starts at θ; a head that θ does not have starts from `start`.

    Args:
        network: body and head.
        adapts: which parameters adapt, see `Adapts`.
        proximal: λ, how strongly φ is held to θ (0 for MAML, positive for iMAML).
        statistics: see `Statistics`. The inner loss always uses the support's own.
        start: see `head_problem`; not read where θ has a head.
        loss: see `head_problem`.

    Returns:
        The problem; its context is a `NetworkContext`.

    Raises:
        ValueError: `proximal` is negative, no parameter adapts, a label or `statistics` has another
            name, or `start` does not fit.
    """
    checks.not_negative("proximal", proximal)
    check_statistics(statistics)
    labels, fixed, losses = _labels(network, adapts), fixed_start(network, start), of_examples(loss)
    mask = jax.tree.map(lambda label: label == "adapts", labels)

    def parts(theta: MetaParams) -> tuple[PyTree, PyTree]:
        return trees.split({"head": fixed(), **theta}, mask)

    def embed(theta: MetaParams, task: Task) -> NetworkContext:
        chosen, rest = parts(theta)
        return NetworkContext(rest, chosen if proximal else None, task)

    def composite(context: NetworkContext) -> Composite:
        inputs = context.task.support_inputs
        weights = present(context.task.support_targets)
        key = key_of(context.task, "support")

        def outputs(params: Params) -> Array:
            network_params = trees.merge(params, context.rest)
            features = network.noisy_body(network_params["body"], inputs, weights, key)
            found: Array = network.head(network_params["head"], features)
            return found

        targets = context.task.support_targets
        mean = partial(support_mean, losses, targets=targets)
        return Composite(outputs, mean, proximal)

    def inner_loss(params: Params, context: NetworkContext) -> Scalar:
        fit = composite(context)
        mean = fit.loss(fit.outputs(params))
        if context.anchor is None:
            return mean
        return mean + half_square(proximal, jax.tree.map(jnp.subtract, params, context.anchor))

    def outer_loss(params: Params, context: NetworkContext) -> tuple[Scalar, Any]:
        network_params = trees.merge(params, context.rest)
        inputs = context.task.query_inputs
        if statistics == "support":
            _, features = features_of(network, network_params["body"], context.task, "support")
        else:
            weights = present(context.task.query_targets)
            key = key_of(context.task, "query")
            features = network.noisy_body(network_params["body"], inputs, weights, key)
        outputs = network.head(network_params["head"], features)
        targets = (context.task.query_targets, context.task.support_targets)
        return query_mean(losses, outputs, *targets)

    check = partial(check_tasks, network.ways, loss)
    # of a user's loss it is not known whether it is convex in the outputs
    structure = Structure(check=check, composite=composite if loss is None else None)
    init = lambda theta: parts(theta)[0]  # noqa: E731
    return Problem(embed, inner_loss, outer_loss, init, structure=structure)


def _labels(network: Network, adapts: Adapts) -> PyTree[str]:
    """The label of each parameter of a network.

    Raises:
        ValueError: there are others than `LABELS`, they do not fit, or none is "adapts".
    """
    shapes = jax.eval_shape(network.init, jax.random.key(0))

    def label(path: tuple[Any, ...], _: Any) -> Any:
        name = trees.path_name(path)
        if callable(adapts):
            found = adapts(name)
            return found if isinstance(found, str) else ("shared", "adapts")[bool(found)]
        return "adapts" if adapts in ("all", name.split("/")[0]) else "shared"

    if isinstance(adapts, str) or callable(adapts):
        labels = jax.tree_util.tree_map_with_path(label, shapes)
    else:
        labels = _from_tree(adapts, shapes)
    for found in jax.tree.leaves(labels):
        checks.one_of("adapts", found, LABELS)
    if "adapts" not in jax.tree.leaves(labels):
        names = [trees.path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(shapes)]
        raise ValueError(
            f"adapts: {adapts!r} chooses no parameter. Expected 'head', 'body', 'all', a predicate "
            f"that is true for some of these, or a tree of labels: {', '.join(names)}."
        )
    return labels


def _from_tree(adapts: PyTree[str], shapes: PyTree) -> PyTree[str]:
    """The label of each parameter: of the longest path in the tree that leads to it, or above it.

    Raises:
        ValueError: a path of the tree leads to no parameter.
    """
    given = {
        trees.path_name(path): label for path, label in jax.tree_util.tree_leaves_with_path(adapts)
    }
    names = [trees.path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(shapes)]
    unmet = [name for name in given if not any(f"{n}/".startswith(f"{name}/") for n in names)]
    if unmet:
        raise ValueError(
            f"adapts: found labels for {', '.join(unmet)}, expected paths of parameters, or of "
            f"what lies above them: {', '.join(names)}."
        )

    def label(path: tuple[Any, ...], _: Any) -> str:
        name = trees.path_name(path)
        above = [p for p in given if f"{name}/".startswith(f"{p}/")]
        return given[max(above, key=len)] if above else "shared"

    found: PyTree[str] = jax.tree_util.tree_map_with_path(label, shapes)
    return found


def half_square(weight: float, tree: PyTree) -> Scalar:
    """weight/2 · ‖tree‖², in float32 at least."""
    wide = [leaf.astype(trees.accumulator(leaf.dtype)) for leaf in jax.tree.leaves(tree)]
    squares = [jnp.sum(jnp.square(leaf)) for leaf in wide]
    return 0.5 * weight * sum(squares[1:], squares[0])
