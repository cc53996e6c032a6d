"""A flax nnx module as a `Network`: its graph is fixed once, its parameters are the pytree."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
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
    package,
)
from memmeta.models._from_linen import mask_of
from memmeta.models._network import Network, Params


def from_nnx(
    module: Any,
    example: PyTree,
    *,
    head: Where = LAST,
    call: Call | None = None,
    running_averages: bool = False,
) -> Network:
    """A module of flax nnx as a network: a body, and one of its layers as the head.

    Args:
        module: rngs -> the module, drawn anew by `Network.init`; or a module, from whose parameters
            every `init` starts, such as a pretrained one. Its `nnx.Param` are the parameters. Other
            variables are the same in every pass: what a pass changes in them is thrown away, so
            that nothing leaks from one task into another. Noise, such as dropout, is on in passes
            that have a key.
        example: inputs of two or more examples, arrays or `jax.ShapeDtypeStruct`.
        head: the path of the layer that is the head, "out" or "layers/2", or a predicate on such
            paths; by default the last layer with parameters. None: no head, the features are the
            outputs.
        call: (module, inputs, key) -> outputs, for a module that is not called with its inputs
            alone; a key says that noise is on, None that it is off.
        running_averages: whether batch normalisation reads the module's running averages; by
            default it takes the statistics of the examples that the pass gives weight to.

    Returns:
        The network; names of parameters are paths, "hidden/kernel".

    Raises:
        ValueError: `head` is no layer that can be split off; what there is to choose from is said.

    Example:
        >>> from flax import nnx
        >>> network = from_nnx(
        ...     lambda rngs: nnx.Sequential(
        ...         nnx.Linear(3, 8, rngs=rngs), nnx.relu, nnx.Linear(8, 5, rngs=rngs)
        ...     ),
        ...     jax.ShapeDtypeStruct((2, 3), "float32"),
        ... )
        >>> network.features, network.ways
        (8, 5)
    """

    nnx: Any = package("flax.nnx", "flax")  # which loads for as long as the rest of memmeta

    class Identity(nnx.Module):  # type: ignore[misc]
        """Stands where the head was."""

        def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            """What it is given first."""
            return inputs

    class Seen(nnx.Module):  # type: ignore[misc]
        """A layer that says when it is called."""

        def __init__(self, layer: Any, note: Callable[[], None]) -> None:
            self.layer, self.note = layer, note

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            """What the layer returns."""
            self.note()
            return self.layer(*args, **kwargs)

        def __getattr__(self, name: str) -> Any:
            return getattr(object.__getattribute__(self, "layer"), name)

    class Weighted(nnx.Module):  # type: ignore[misc]
        """Batch normalisation by the statistics of the examples that have weight."""

        def __init__(self, layer: Any, weights: Array) -> None:
            self.layer, self.weights = layer, nnx.Variable(weights)

        def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            """Normalise `inputs`; what the module says about its averages is not read."""
            mask = mask_of(self.weights[...], inputs.ndim)
            return self.layer(inputs, use_running_average=False, mask=mask)

    def make(key: Array) -> Any:
        return module if isinstance(module, nnx.Module) else module(nnx.Rngs(key))

    def run(model: Any, inputs: PyTree, key: Any, weights: Any) -> Any:
        if key is None:
            model.eval()
        else:
            model.train()
        for path, layer in list(nnx.iter_modules(model)):
            if isinstance(layer, nnx.BatchNorm):
                layer.use_running_average = running_averages
                if path and weights is not None and not running_averages:
                    _put(model, path, Weighted(layer, weights))
        if call is not None:
            return call(model, inputs, key)
        return model(inputs, **by_names(type(model).__call__)(key, weights))

    whole_graph, drawn, rest = _split(nnx, make(jax.random.key(0)))
    found = nnx.merge(whole_graph, drawn, rest, copy=True)
    modules = {_name(path): path for path, _ in nnx.iter_modules(found) if path}
    order: list[str] = []

    def trace(drawn: Any, inputs: PyTree) -> Any:
        model = nnx.merge(whole_graph, drawn, rest, copy=True)
        model.eval()
        for path, layer in list(nnx.iter_modules(model)):
            if path and any(isinstance(value, nnx.Param) for value in vars(layer).values()):
                _put(model, path, Seen(layer, partial(order.append, _name(path))))
        names = by_names(type(model).__call__)(None, None)
        return call(model, inputs, None) if call is not None else model(inputs, **names)

    if head == LAST:
        with met_first(call):
            jax.eval_shape(trace, drawn, example)
    name = choose(order, list(modules), head)

    def halves(model: Any) -> tuple[Any, Any]:
        """The body and the head of a module, which is changed."""
        if name is None:
            return model, Identity()
        layer = _get(model, modules[name])
        _put(model, modules[name], Identity())
        return model, layer

    body_module, head_module = halves(found)
    body_graph, body_like, body_rest = _split(nnx, body_module)
    head_graph, head_like, head_rest = _split(nnx, head_module)
    if len(_flat(nnx, body_like)) + len(_flat(nnx, head_like)) != len(_flat(nnx, drawn)):
        raise ValueError(
            f"head: {name!r} shares parameters with the rest. Write head=None, and say what adapts "
            "by a predicate."
        )

    def init(key: Array) -> Params:
        model = make(key)
        graph, state = nnx.split(model)
        body, head = halves(nnx.merge(graph, state))
        return {
            "body": _flat(nnx, nnx.state(body, nnx.Param)),
            "head": _flat(nnx, nnx.state(head, nnx.Param)),
        }

    def body(
        params: Params, inputs: PyTree, weights: Float[Array, " examples"], key: Any = None
    ) -> Any:
        state = _like(nnx, body_like, params)
        return run(
            nnx.merge(body_graph, state, _drawing(nnx, body_rest, key), copy=True),
            inputs,
            key,
            weights,
        )

    def apply_head(params: Params, features: Any) -> Any:
        layer: Any = nnx.merge(head_graph, _like(nnx, head_like, params), head_rest, copy=True)
        layer.eval()
        return layer(features)

    def whole(params: Params, inputs: PyTree) -> Any:
        model, layer = (
            nnx.merge(body_graph, _like(nnx, body_like, params["body"]), body_rest, copy=True),
            None,
        )
        if name is not None:
            layer = nnx.merge(
                head_graph, _like(nnx, head_like, params["head"]), head_rest, copy=True
            )
            _put(model, modules[name], layer)
        return run(model, inputs, None, None)

    is_dense = isinstance(head_module, nnx.Linear) and head_module.bias is not None
    dense = (lambda params: dict(params)) if is_dense else None
    return assemble(Parts(init, body, apply_head, whole, name, dense), example)


def _drawing(nnx: Any, rest: Any, key: Any) -> Any:
    """The variables that are no parameters, with random streams that begin at a key."""
    if key is None:
        return rest
    streams = iter(range(len(jax.tree.leaves(rest))))

    def fresh(variable: Any) -> Any:
        if isinstance(variable, nnx.RngKey):
            return variable.replace(jax.random.fold_in(key, next(streams)))
        return variable

    return jax.tree.map(fresh, rest, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def _split(nnx: Any, module: Any) -> tuple[Any, Any, Any]:
    """The graph, the parameters and the other variables."""
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    return graph, params, rest


def _flat(nnx: Any, state: Any) -> dict[str, Array]:
    return {_name(path): variable[...] for path, variable in nnx.to_flat_state(state)}


def _like(nnx: Any, state: Any, params: dict[str, Array]) -> Any:
    flat = nnx.to_flat_state(state)
    return nnx.from_flat_state([(p, v.replace(params[_name(p)])) for p, v in flat])


def _name(path: tuple[Any, ...]) -> str:
    return "/".join(map(str, path))


def _get(module: Any, path: tuple[Any, ...]) -> Any:
    for part in path:
        module = module[part] if isinstance(part, int) else getattr(module, part)
    return module


def _put(module: Any, path: tuple[Any, ...], layer: Any) -> None:
    parent = _get(module, path[:-1])
    if isinstance(path[-1], int):
        parent[path[-1]] = layer
    else:
        setattr(parent, path[-1], layer)
