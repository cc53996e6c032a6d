"""An equinox module as a `Network`: its floating-point arrays are the parameters."""

import inspect
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from memmeta._shared import trees
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
from memmeta.models._network import Network, Params


def from_equinox(
    module: Any,
    example: PyTree,
    *,
    head: Where = LAST,
    call: Call | None = None,
    running_averages: bool = False,
) -> Network:
    """A module of equinox as a network: a body, and one of its layers as the head.

    Args:
        module: key -> the module, drawn anew by `Network.init`; or a module, from whose parameters
            every `init` starts, such as a pretrained one. In place of the module there may be
            (module, state), as `equinox.nn.make_with_state` gives. It is called with one example,
            as equinox has it, and mapped over the examples. Floating-point arrays are its
            parameters; functions, other arrays and the state are the same in every pass: what a
            pass changes in the state is thrown away, so that nothing leaks from one task into
            another.
        example: inputs of two or more examples, arrays or `jax.ShapeDtypeStruct`.
        head: the path of the layer that is the head, "out" or "layers/2", or a predicate on such
            paths; by default the last layer with parameters. None: no head, the features are the
            outputs.
        call: (module, inputs, key) -> outputs of one example, for a module that is called
            otherwise than (inputs, key=…, state=…); a key says that noise is on, None that it is
            off.
        running_averages: whether batch normalisation reads the averages of the state; by default
            it takes the statistics of the examples that the pass gives weight to.

    Returns:
        The network; names of parameters are paths, "layers/0/weight".

    Raises:
        ModuleNotFoundError: equinox is not installed.
        ValueError: `head` is no layer that can be split off; what there is to choose from is said.

    Example:
        >>> import equinox as eqx
        >>> network = from_equinox(
        ...     lambda key: eqx.nn.MLP(3, 5, width_size=8, depth=1, key=key),
        ...     jax.ShapeDtypeStruct((2, 3), jnp.float32),
        ... )
        >>> network.features, network.ways
        (8, 5)
    """
    eqx = package("equinox", "equinox")

    class Seen(eqx.Module):  # type: ignore[misc, name-defined]
        """A layer that says when it is called, and with how many axes."""

        layer: Any
        name: str = eqx.field(static=True)

        def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            order.append(self.name)
            axes[self.name] = jax.tree.leaves(inputs)[0].ndim
            return self.layer(inputs, *args, **kwargs)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.layer, name)

    class Weighted(eqx.Module):  # type: ignore[misc, name-defined]
        """Batch normalisation by the statistics of the examples that have weight."""

        layer: Any
        weight: Array
        axis: str = eqx.field(static=True)

        def __call__(self, x: Array, state: Any, **kwargs: Any) -> tuple[Array, Any]:
            positions = tuple(range(1, x.ndim))
            total = jax.lax.psum(self.weight, self.axis)
            share = jnp.where(total > 0, self.weight / jnp.where(total > 0, total, 1), 0)
            across = (slice(None), *(None,) * len(positions))
            mean = jax.lax.psum(share * x.mean(positions), self.axis)[across]
            squares = jnp.square(x - mean).mean(positions)
            variance = jax.lax.psum(share * squares, self.axis)[across]
            found = (x - mean) / jnp.sqrt(variance + self.layer.eps)
            if self.layer.channelwise_affine:
                found = found * self.layer.weight[across] + self.layer.bias[across]
            return found, state

    order: list[str] = []
    axes: dict[str, int] = {}

    def make(key: Array) -> tuple[Any, Any]:
        made = module if isinstance(module, eqx.Module | tuple) else module(key)
        return made if isinstance(made, tuple) else (made, None)

    def within(model: Any) -> Iterator[tuple[tuple[Any, ...], Any]]:
        return _modules(model, (), eqx.Module)

    def run(model: Any, state: Any, inputs: PyTree, key: Any, weights: Any) -> Any:
        if weights is None:
            weights = jnp.ones(jax.tree.leaves(inputs)[0].shape[0], jnp.float32)
        model = eqx.nn.inference_mode(model, key is None or running_averages)
        norms = [path for path, layer in within(model) if isinstance(layer, eqx.nn.BatchNorm)]
        names = {_get(model, path).axis_name for path in norms} or {"examples"}
        if running_averages and key is not None:
            for path, layer in within(model):
                if isinstance(layer, eqx.nn.Dropout):
                    model = _put(eqx, model, path, eqx.nn.inference_mode(layer, False))
        axis = names.pop()
        named = by_names(type(model).__call__)

        def one(inputs: PyTree, key: Any, weight: Array) -> Any:
            called = model
            for path in () if running_averages else norms:
                called = _put(eqx, called, path, Weighted(_get(model, path), weight, axis))
            if call is not None:
                return call(called, inputs, key)
            taken = inspect.signature(type(model).__call__).parameters
            more = {"key": key, "state": state}
            more = {name: value for name, value in more.items() if name in taken}
            found = called(inputs, **named(key, weight), **more)
            return found[0] if "state" in more else found

        keys = None if key is None else jax.random.split(key, weights.shape[0])
        keyed = None if key is None else 0
        return jax.vmap(one, in_axes=(0, keyed, 0), axis_name=axis)(inputs, keys, weights)

    drawn, state = make(jax.random.key(0))
    modules = {_name(path): path for path, _ in within(drawn) if path}

    def trace(inputs: PyTree) -> Any:
        model = drawn
        for path, layer in list(within(drawn)):
            own = any(eqx.is_inexact_array(value) for value in vars(layer).values())
            if path and own and not isinstance(layer, eqx.nn.BatchNorm):
                model = _put(eqx, model, path, Seen(layer, _name(path)))
        return run(model, state, inputs, None, None)

    with met_first(call):
        jax.eval_shape(trace, example)
    name = choose(order, list(modules), head)

    def halves(model: Any) -> tuple[Any, Any]:
        if name is None:
            return model, eqx.nn.Identity()
        return _put(eqx, model, modules[name], eqx.nn.Identity()), _get(model, modules[name])

    likes = halves(drawn)

    def init(key: Array) -> Params:
        body, head = halves(make(key)[0])
        return {"body": _flat(eqx, body), "head": _flat(eqx, head)}

    def body(
        params: Params, inputs: PyTree, weights: Float[Array, " examples"], key: Any = None
    ) -> Any:
        return run(_like(eqx, likes[0], params), state, inputs, key, weights)

    def apply_head(params: Params, features: Any) -> Any:
        layer = eqx.nn.inference_mode(_like(eqx, likes[1], params))
        if name is None:
            return features
        for _ in range(jax.tree.leaves(features)[0].ndim - axes.get(name, 1)):
            layer = jax.vmap(layer)
        return layer(features)

    def whole(params: Params, inputs: PyTree) -> Any:
        model = _like(eqx, likes[0], params["body"])
        if name is not None:
            model = _put(eqx, model, modules[name], _like(eqx, likes[1], params["head"]))
        return run(model, state, inputs, None, None)

    def dense(params: Params) -> Params:
        return {"kernel": params["weight"].T, "bias": params["bias"]}

    is_dense = isinstance(likes[1], eqx.nn.Linear) and likes[1].use_bias
    is_dense = is_dense and axes.get(name or "") == 1
    parts = Parts(init, body, apply_head, whole, name, dense if is_dense else None)
    return assemble(parts, example)


def _modules(tree: Any, path: tuple[Any, ...], kind: type) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Paths of the modules in a module, itself included."""
    if isinstance(tree, kind):
        yield path, tree
        items: Any = vars(tree).items()
    elif isinstance(tree, dict):
        items = tree.items()
    elif isinstance(tree, list | tuple):
        items = enumerate(tree)
    else:
        return
    for name, value in items:
        yield from _modules(value, (*path, name), kind)


def _flat(eqx: Any, tree: Any) -> dict[str, Array]:
    leaves = jax.tree_util.tree_leaves_with_path(eqx.filter(tree, eqx.is_inexact_array))
    return {trees.path_name(path): leaf for path, leaf in leaves}


def _like(eqx: Any, tree: Any, params: dict[str, Array]) -> Any:
    _, static = eqx.partition(tree, eqx.is_inexact_array)
    floats = eqx.filter(tree, eqx.is_inexact_array)
    found = jax.tree_util.tree_map_with_path(lambda path, _: params[trees.path_name(path)], floats)
    return eqx.combine(found, static)


def _name(path: tuple[Any, ...]) -> str:
    return "/".join(map(str, path))


def _get(tree: Any, path: tuple[Any, ...]) -> Any:
    for part in path:
        tree = getattr(tree, part) if isinstance(part, str) and hasattr(tree, part) else tree[part]
    return tree


def _put(eqx: Any, tree: Any, path: tuple[Any, ...], layer: Any) -> Any:
    return eqx.tree_at(lambda tree: _get(tree, path), tree, layer) if path else layer
