"""A network of the parts into which a module of another library was taken."""

import importlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from memmeta._shared import checks
from memmeta.models._build import linear_head
from memmeta.models._network import Network, Params

Where: TypeAlias = str | Callable[[str], bool] | None
"""The head of a module: the path of a layer, a predicate on paths, or None."""
LAST = "last layer"
"""The head is the layer with parameters that is called last."""
Call: TypeAlias = Callable[[Any, Any, Any], Any]
"""(module, inputs, key) -> outputs; a key says that noise such as dropout is on, None: off."""


@dataclass(frozen=True)
class Parts:
    """A module of another library as pure functions.

    Attributes:
        init: PRNG key -> {"body": ..., "head": ...}.
        body: see `Network`.
        head: see `Network`.
        whole: (params, inputs) -> outputs, of the module as it was, without noise.
        head_name: the path of the head, for errors; None without one.
        dense: head params -> {"kernel": [features, ways], "bias": [ways]}, of a linear head.
    """

    init: Callable[[Array], Params]
    body: Callable[..., Any]
    head: Callable[[Params, Any], Any]
    whole: Callable[[Params, Any], Any]
    head_name: str | None
    dense: Callable[[Params], Params] | None = None


def package(module: str, name: str) -> Any:
    """A package that memmeta does not depend on.

    Raises:
        ModuleNotFoundError: it is not installed, and how to install it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise ModuleNotFoundError(f"{name} is not installed: pip install {name}") from error


def by_names(function: Callable[..., Any]) -> Callable[[Any, Any], dict[str, Any]]:
    """(key, weights) -> the arguments of a module's call that have a well-known name.

    Example:
        >>> by_names(lambda x, train: x)(None, None), by_names(lambda x: x)(None, None)
        ({'train': False}, {})
    """
    taken = inspect.signature(function).parameters

    def arguments(key: Any, weights: Any) -> dict[str, Any]:
        noisy = key is not None
        known = dict.fromkeys(("train", "training", "is_training"), noisy)
        known |= dict.fromkeys(("deterministic", "inference"), not noisy) | {"weights": weights}
        return {name: value for name, value in known.items() if name in taken}

    return arguments


@contextmanager
def met_first(call: Call | None) -> Iterator[None]:
    """Say how to call a module whose arguments are others than the inputs and well-known names.

    Raises:
        TypeError: that of the module, with the remedy.
    """
    try:
        yield
    except TypeError as error:
        if call is not None or "argument" not in str(error):
            raise
        raise TypeError(
            f"{error}. Say how the module is called, for instance by "
            'call=lambda module, x, key: module(x["ids"], x["mask"], noisy=key is not None).'
        ) from error


def choose(layers: Sequence[str], modules: Sequence[str], head: Where) -> str | None:
    """The path of the head.

    Args:
        layers: paths of the layers with parameters of their own, in the order of their calls.
        modules: paths of all modules inside the whole.
        head: see `Where`, or `LAST`.

    Raises:
        ValueError: no module, or more than one, is meant.

    Example:
        >>> choose(["a", "b/c"], ["a", "b", "b/c"], lambda path: path.startswith("b"))
        'b'
    """
    if head is None:
        return None
    if head == LAST:
        if not layers:
            raise ValueError("head: found no layer with parameters. Write head=None.")
        return layers[-1]
    if isinstance(head, str):
        if head in modules:
            return head
        near = checks.meant(head, modules)
        raise ValueError(f"head: found no module {head!r}, only {', '.join(modules)}.{near}")
    meant_all = [path for path in modules if head(path)]
    outermost = [p for p in meant_all if not any(p.startswith(f"{q}/") for q in meant_all)]
    if len(outermost) != 1:
        raise ValueError(
            f"head: the predicate chooses {', '.join(outermost) or 'nothing'}, expected one of "
            f"{', '.join(modules)}."
        )
    return outermost[0]


def ones_like_examples(inputs: PyTree) -> Array:
    """Weights of examples that all count."""
    return jnp.ones(jax.tree.leaves(inputs)[0].shape[0], jnp.float32)


def assemble(parts: Parts, example: PyTree) -> Network:
    """The network; its head and body together are compared with the module once.

    Args:
        parts: of the module.
        example: inputs of two or more examples; what stands in for arrays is filled with numbers.

    Raises:
        ValueError: head and body together are not the module, or its outputs have no second axis.
    """
    inputs = jax.tree.map(_filled, example)
    params = _moved(parts.init(jax.random.key(0)))
    expected = jax.jit(parts.whole)(params, inputs)
    name = parts.head_name
    problem = (
        f"head: the module is not its body followed by {name!r}. Something comes after it, such as "
        "[:, 0] or a softmax: that belongs into the loss. Or it is called more than once, with "
        "more than one argument, or shares parameters with the rest: choose another head, or "
        "head=None, and say what adapts by a predicate."
    )
    try:
        features = jax.jit(parts.body)(params["body"], inputs, ones_like_examples(inputs))
        # on more axes, as of a sequence, it is a dense layer and no linear head
        if parts.dense is not None and getattr(features, "ndim", 0) == 2:
            params = {"body": params["body"], "head": parts.dense(params["head"])}
            parts = _with_linear_head(parts, parts.dense)
        outputs = jax.jit(parts.head)(params["head"], features)
    except Exception as error:
        if name is None:
            raise
        raise ValueError(f"{problem} It raised {type(error).__name__}.") from error
    if not _same(outputs, expected):
        raise ValueError(problem)
    if isinstance(outputs, jax.Array) and outputs.ndim < 2:
        raise ValueError(
            f"module: its outputs have shape {list(outputs.shape)}, expected [examples, outputs]. "
            "Leave [..., 0] out, or write outputs[..., None]."
        )
    shapes = [leaf.shape for leaf in jax.tree.leaves(features)]
    width = shapes[0][1] if len(shapes) == 1 and len(shapes[0]) == 2 else None
    ways = jax.tree.leaves(outputs)[0].shape[-1]
    return Network(parts.init, parts.body, parts.head, width, ways)


def _with_linear_head(parts: Parts, dense: Callable[[Params], Params]) -> Parts:
    def init(key: Array) -> Params:
        params = parts.init(key)
        return {"body": params["body"], "head": dense(params["head"])}

    return Parts(init, parts.body, linear_head, parts.whole, parts.head_name)


def _moved(params: Params) -> Params:
    """Parameters away from the zeros and ones of a start, where unlike functions agree."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), max(len(leaves), 1))
    moved = [
        x + 0.1 * jax.random.normal(k, x.shape, x.dtype) for x, k in zip(leaves, keys, strict=False)
    ]
    return jax.tree.unflatten(structure, moved)


def _filled(leaf: Any) -> Any:
    """An array as it is; of a shape random numbers, or zeros where they are integers."""
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return jnp.asarray(leaf)
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        return jax.random.normal(jax.random.key(0), leaf.shape, leaf.dtype)
    return jnp.zeros(leaf.shape, leaf.dtype)


def _same(found: PyTree, expected: PyTree) -> bool:
    structures: list[Any] = [jax.tree.structure(tree) for tree in (found, expected)]
    return structures[0] == structures[1] and all(
        np.shape(a) == np.shape(b)
        and np.allclose(
            np.asarray(a, np.float32), np.asarray(b, np.float32), 1e-3, 1e-4, equal_nan=True
        )
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    )
