"""A flax linen module as a `Network`: its layers are met by an interceptor while it runs."""

import inspect
from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from memmeta.models._assemble import (
    LAST,
    Call,
    Parts,
    Where,
    assemble,
    by_names,
    choose,
    met_first,
)
from memmeta.models._network import Network, Params


def from_linen(
    module: nn.Module,
    example: PyTree,
    *,
    head: Where = LAST,
    call: Call | None = None,
    variables: dict[str, Any] | None = None,
    running_averages: bool = False,
) -> Network:
    """A module of flax linen as a network: a body, and one of its layers as the head.

    Args:
        module: of call (inputs) -> outputs. Of further arguments it may have `train`, `training`,
            `is_training`, `deterministic` (whether noise is on) and `weights` (of the examples).
        example: inputs of two or more examples, arrays or `jax.ShapeDtypeStruct`.
        head: the path of the layer that is the head, "Dense_1" or "decoder/out", or a predicate on
            such paths; by default the last layer with parameters. None: no head, the features are
            the outputs.
        call: (module, inputs, key) -> outputs, for a module that is called otherwise; a key says
            that noise is on, None that it is off.
        variables: what `module.init` gave or training left; None: drawn anew by `Network.init`.
            Collections other than "params" are the same in every pass: what a pass changes in them
            is thrown away, so that nothing leaks from one task into another.
        running_averages: whether batch normalisation reads the running averages of `variables`, as
            a pretrained module's does. By default it takes the statistics of the examples that
            the pass gives weight to, in training and at test, whatever the module says.

    Returns:
        The network.

    Raises:
        ValueError: `head` is no layer that can be split off; what there is to choose from is said.

    Example:
        >>> class Classifier(nn.Module):
        ...     @nn.compact
        ...     def __call__(self, x, train):
        ...         x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Dense(8)(x)))
        ...         return nn.Dense(5)(nn.Dropout(0.1, deterministic=not train)(x))
        >>> network = from_linen(Classifier(), jax.ShapeDtypeStruct((2, 3), jnp.float32))
        >>> network.features, network.ways
        (8, 5)
    """
    names = by_names(type(module).__call__)

    def run(bound: nn.Module, inputs: PyTree, key: Any, weights: Any) -> Any:
        if call is not None:
            return call(bound, inputs, key)
        return cast(Any, bound)(inputs, **names(key, weights))

    def apply(everything: PyTree, inputs: PyTree, weights: Any, key: Any, seen: Any = None) -> Any:
        meet = _interceptor(running_averages, weights, key, seen)
        with nn.intercept_methods(meet):
            return module.apply(
                everything,
                inputs,
                key,
                weights,
                method=run,
                mutable=nn.DenyList("params"),
                rngs=None if key is None else {"params": key, "dropout": key},
            )[0]

    def start(key: Array) -> Any:
        if variables is not None:
            return variables
        inputs = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), example)
        with nn.intercept_methods(_interceptor(False, None, None, None)):
            return module.init(key, inputs, None, None, method=run)

    with met_first(call):
        drawn = start(jax.random.key(0))
    rest = {name: tree for name, tree in drawn.items() if name != "params"}
    calls: dict[str, tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = {}

    def note(bound: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls["/".join(bound.path)] = (bound.unbind()[0], args[1:], kwargs)

    jax.eval_shape(lambda tree, x: apply(tree, x, None, None, note), drawn, example)
    layers = [path for path in calls if _has_arrays(_at(drawn.get("params", {}), path))]
    name = choose(layers, list(calls), head)

    def whole(params: Params, inputs: PyTree) -> Any:
        joined = _joined(params["body"], name, params["head"])
        return apply({"params": joined, **rest}, inputs, None, None)

    def skip(bound: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args[:1] if "/".join(bound.path) == name else None

    def body(
        params: Params, inputs: PyTree, weights: Float[Array, " examples"], key: Any = None
    ) -> Any:
        return apply({"params": params, **rest}, inputs, weights, key, skip)

    def init(key: Array) -> Params:
        params = start(key).get("params", {})
        if name is None:
            return {"body": params, "head": {}}
        return {"body": _without(params, name.split("/")), "head": _at(params, name)}

    if name is None:
        return assemble(Parts(init, body, lambda _, features: features, whole, None), example)
    layer, args, kwargs = calls[name]
    of_layer = {kind: _at(tree, name) for kind, tree in rest.items()}

    def apply_head(params: Params, features: Any) -> Any:
        with nn.intercept_methods(_interceptor(running_averages, None, None, None)):
            everything = {"params": params, **of_layer}
            mutable = nn.DenyList("params")
            return layer.apply(everything, features, *args, mutable=mutable, **kwargs)[0]

    is_dense = isinstance(layer, nn.Dense) and layer.use_bias and layer.dtype in (None, jnp.float32)
    dense = (lambda params: dict(params)) if is_dense else None
    return assemble(Parts(init, body, apply_head, whole, name, dense), example)


def _interceptor(
    running_averages: bool, weights: Any, key: Any, seen: Callable[..., Any] | None
) -> Callable[..., Any]:
    """Noise only with a key, statistics by the weights; `seen` may answer for a module's call."""

    def meet(following: Any, args: tuple[Any, ...], kwargs: dict[str, Any], context: Any) -> Any:
        bound = context.module
        if context.method_name != "__call__":
            return following(*args, **kwargs)
        if bound.path and seen is not None and (answer := seen(bound, args, kwargs)) is not None:
            return answer[0]
        if type(bound).__module__.startswith("flax.linen"):
            set_to: dict[str, Any] = {}
            taken = inspect.signature(type(bound).__call__).parameters
            if isinstance(bound, nn.BatchNorm):
                set_to["use_running_average"] = running_averages
                if weights is not None:
                    set_to["mask"] = mask_of(weights, args[0].ndim)
            elif key is None and "deterministic" in taken:
                set_to["deterministic"] = True
            if set_to:
                given = inspect.signature(following).bind(*args, **kwargs).arguments
                for name in set_to:
                    if hasattr(bound, name):
                        object.__setattr__(bound, name, None)  # linen refuses to be told twice
                first = given.pop(next(iter(given)))
                return following(first, **given | set_to)
        return following(*args, **kwargs)

    return meet


def mask_of(weights: Float[Array, " examples"], ndim: int) -> Array:
    """Which examples give the statistics, for flax: all where none has weight."""
    counts = (weights > 0) | ~jnp.any(weights > 0)
    return counts.reshape(-1, *(1,) * (ndim - 1))


def _at(tree: Any, path: str) -> Any:
    for part in path.split("/"):
        tree = tree.get(part, {})
    return tree


def _without(tree: Any, path: list[str]) -> Any:
    first, *others = path
    if not others:
        return {name: value for name, value in tree.items() if name != first}
    return {n: _without(v, others) if n == first else v for n, v in tree.items()}


def _joined(tree: Any, path: str | None, head: Any) -> Any:
    if path is None:
        return tree
    first, _, others = path.partition("/")
    inner = _joined(tree.get(first, {}), others, head) if others else head
    return {**tree, first: inner}


def _has_arrays(tree: Any) -> bool:
    """Whether a layer has parameters of its own, not only its layers."""
    return any(not hasattr(value, "items") for value in tree.values())
