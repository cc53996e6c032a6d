"""Low-rank adapters for the matrices of a network of any library."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PyTree

from memmeta._shared import checks, trees
from memmeta.models._network import Network, Params


class LowRank(NamedTuple):
    """The matrix W + down @ up, which is not formed where it is multiplied with.

    Attributes:
        matrix: W, [rows, columns].
        down: [rows, rank].
        up: [rank, columns].
    """

    matrix: Float[Array, "rows columns"]
    down: Float[Array, "rows rank"]
    up: Float[Array, "rank columns"]

    @property
    def formed(self) -> Float[Array, "rows columns"]:
        """W + down @ up."""
        return self.matrix + self.down @ self.up


def lora(
    network: Network,
    rank: int,
    where: Callable[[str], bool] | None = None,
    *,
    scale: float = 1.0,
    frozen: Params | None = None,
) -> Network:
    r"""A network whose body has low-rank adapters beside its matrices.

    $$x W' = x W + s \, (x A) B, \qquad A \in R^{n \times r}, \quad B \in R^{r \times m}$$

    A is random, B zero at the start, so that the network is the old one. Where all tasks share W
    and each has its A and B, no task has a matrix of W's size: give a method
    `adapts=lambda path: path.startswith("body/lora/")`.

    Args:
        network: of any library.
        rank: r.
        where: a predicate on paths of the body's parameters, "Dense_0/kernel"; None: every matrix.
            It chooses among the floating-point arrays of two axes.
        scale: s.
        frozen: parameters like `network.init(key)`, such as pretrained ones: those of the body stay
            outside of θ, are never learned, and the head starts at theirs. None: W is part of θ.

    Returns:
        The network; its body's parameters are {"base": the old ones, "lora": {path: {"down",
        "up"}}}, without "base" where it is frozen.

    Raises:
        ValueError: `rank` is less than 1, `where` chooses no matrix, or `frozen` is not like
            `network.init(key)`.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (ICLR 2022), 4.1.

    Example:
        >>> from memmeta.models import mlp
        >>> network = lora(mlp(2, (8,), (4,)), rank=2)
        >>> shapes = jax.eval_shape(network.init, jax.random.key(0))["body"]["lora"]
        >>> [(name, x["down"].shape, x["up"].shape) for name, x in shapes.items()]
        [('Dense_0/kernel', (4, 2), (2, 8))]
    """
    checks.count("rank", rank)
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    leaves = jax.tree_util.tree_leaves_with_path(shapes["body"])
    names = [trees.path_name(path) for path, _ in leaves]
    if frozen is not None:
        expected, found = (jax.tree.map(jnp.shape, tree) for tree in (shapes, frozen))
        remedy = "Give parameters as network.init(key) makes them, with their body and head."
        checks.require("frozen", found, found == expected, f"shapes {expected}", remedy)
    matrices = {
        name: leaf
        for name, (_, leaf) in zip(names, leaves, strict=True)
        if leaf.ndim == 2 and jnp.issubdtype(leaf.dtype, jnp.floating)
    }
    chosen = {name: leaf for name, leaf in matrices.items() if where is None or where(name)}
    if not chosen:
        raise ValueError(
            f"where: chooses no matrix, expected some of: {', '.join(matrices) or 'there is none'}."
        )

    def init(key: Array) -> Params:
        params = network.init(key) if frozen is None else frozen
        factors = {}
        for number, (name, leaf) in enumerate(chosen.items()):
            draw = jax.random.normal(jax.random.fold_in(key, number), (leaf.shape[0], rank))
            down = (leaf.shape[0] ** -0.5 * draw).astype(leaf.dtype)
            factors[name] = {"down": down, "up": jnp.zeros((rank, leaf.shape[1]), leaf.dtype)}
        base = {"base": params["body"]} if frozen is None else {}
        return {"body": {**base, "lora": factors}, "head": params["head"]}

    def body(
        params: Params, inputs: PyTree, weights: Float[Array, " examples"], key: Any = None
    ) -> Any:
        def features(base: Params) -> Any:
            return network.noisy_body(base, inputs, weights, key)

        whole = params["base"] if frozen is None else frozen["body"]
        arguments = [
            LowRank(leaf, params["lora"][name]["down"], scale * params["lora"][name]["up"])
            if name in chosen
            else leaf
            for name, leaf in zip(names, jax.tree.leaves(whole), strict=True)
        ]
        closed, shapes = jax.make_jaxpr(features, return_shape=True)(whole)
        found = _evaluate(closed.jaxpr, closed.consts, arguments)
        return jax.tree.unflatten(jax.tree.structure(shapes), found)

    return Network(init, body, network.head, network.features, network.ways)


def _evaluate(jaxpr: Any, consts: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
    """A traced function at arguments of which some are `LowRank`."""
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))
    for equation in jaxpr.eqns:
        given = [atom.val if hasattr(atom, "val") else values[atom] for atom in equation.invars]
        found = None
        if any(isinstance(value, LowRank) for value in given):
            found = _unformed(equation.primitive.name, equation.params, given)
        if found is None:
            formed = [value.formed if isinstance(value, LowRank) else value for value in given]
            bound: Any = equation.primitive.get_bind_params(equation.params)
            # the form differs between versions of JAX
            functions, params = bound if isinstance(bound, tuple) else ((), bound)
            found = equation.primitive.bind(*functions, *formed, **params)
            found = found if equation.primitive.multiple_results else [found]
        values.update(zip(equation.outvars, found, strict=True))
    found = [atom.val if hasattr(atom, "val") else values[atom] for atom in jaxpr.outvars]
    return [value.formed if isinstance(value, LowRank) else value for value in found]


def _unformed(name: str, params: Any, given: list[Any]) -> list[Any] | None:
    """What an equation gives without forming the matrix; None where that is not known."""
    if name in ("pjit", "jit"):
        return _evaluate(params["jaxpr"].jaxpr, params["jaxpr"].consts, given)
    if name == "transpose":
        return [LowRank(given[0].matrix.T, given[0].up.T, given[0].down.T)]
    product = _product(*given, **params) if name == "dot_general" else None
    return None if product is None else [product]


def _product(left: Any, right: Any, *, dimension_numbers: Any, **params: Any) -> Array | None:
    """x W' = x W + (x A) B, from either side; None for products of another kind."""
    contracted, batched = dimension_numbers
    both = isinstance(left, LowRank) and isinstance(right, LowRank)
    if both or any(batched) or len(contracted[0]) != 1:
        return None
    (i,), (j,) = contracted

    def dot(a: Array, b: Array, i: int, j: int) -> Array:
        return lax.dot_general(a, b, (((i,), (j,)), ((), ())), **params)

    if isinstance(right, LowRank):
        # the factor with the contracted axis first, then the other
        first, second = (right.down, right.up) if j == 0 else (right.up, right.down)
        low = dot(left, first, i, j)
        return dot(left, right.matrix, i, j) + dot(low, second, low.ndim - 1, j)
    first, second = (left.up, left.down) if i == 1 else (left.down, left.up)
    return dot(left.matrix, right, i, j) + dot(second, dot(first, right, i, j), i, 0)
