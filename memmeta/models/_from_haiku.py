"""A transformed haiku function as a `Network`: its modules are met by an interceptor."""

from inspect import signature
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from memmeta._shared import checks
from memmeta.models._assemble import (
    LAST,
    Call,
    Parts,
    Where,
    assemble,
    choose,
    met_first,
    package,
)
from memmeta.models._network import Network, Params
from memmeta.models._normalization import batch_statistics


def from_haiku(
    transformed: Any,
    example: PyTree,
    *,
    head: Where = LAST,
    call: Call | None = None,
    variables: tuple[Any, Any] | None = None,
    running_averages: bool = False,
) -> Network:
    """A transformed function of haiku as a network: a body, and one of its modules as the head.

    Args:
        transformed: of `haiku.transform` or `haiku.transform_with_state`.
        example: inputs of two or more examples, arrays or `jax.ShapeDtypeStruct`.
        head: the name of the module that is the head, "mlp/~/linear_1", or a predicate on such
            names; by default the last module with parameters. None: no head, the features are the
            outputs.
        call: (apply, inputs, key) -> outputs, for a function of more arguments, for instance
            `lambda apply, x, key: apply(x, is_training=key is not None)`; a key says that noise
            is on, None that it is off.
        variables: (params, state), of a pretrained function; None: the params are drawn anew by
            `Network.init`. The state is the same in every pass: what a pass changes in it is
            thrown away, so that nothing leaks from one task into another.
        running_averages: whether batch normalisation reads the averages of the state; by default
            it takes the statistics of the examples that the pass gives weight to.

    Returns:
        The network.

    Raises:
        ModuleNotFoundError: haiku is not installed.
        ValueError: `head` is no module that can be split off; what there is to choose from is said;
            or `transformed` takes no key.

    Example:
        >>> import haiku as hk
        >>> network = from_haiku(
        ...     hk.transform(lambda x: hk.nets.MLP([8, 5])(x)),
        ...     jax.ShapeDtypeStruct((2, 3), jnp.float32),
        ... )
        >>> network.features, network.ways
        (8, 5)
    """
    hk = package("haiku", "dm-haiku")
    stateful = isinstance(transformed, hk.TransformedWithState)
    keyed = hasattr(transformed, "apply") and "rng" in signature(transformed.apply).parameters
    remedy = "Give what hk.transform(f) returns, without hk.without_apply_rng."
    expected = "a transformed function that takes a key"
    checks.require("transformed", transformed, keyed, expected, remedy)
    lifted = transformed if stateful else hk.with_empty_state(transformed)
    order: list[str] = []
    called: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {}
    name: str | None = None

    def meeting(weights: Any, what: str) -> Any:
        def meet(following: Any, args: Any, kwargs: Any, context: Any) -> Any:
            module = context.module
            if context.method_name != "__call__":
                return following(*args, **kwargs)
            if what == "note":
                order.append(module.module_name)
                called[module.module_name] = (module, args[1:], kwargs)
            if what == "body" and module.module_name == name:
                return args[0]
            if isinstance(module, hk.BatchNorm):
                scale = {key: kwargs[key] for key in ("scale", "offset") if key in kwargs}
                if what != "init" and not running_averages:
                    _average(module, args[0], weights)
                # only in training does it make the state that holds its averages
                return following(args[0], is_training=what == "init", **scale)
            return following(*args, **kwargs)

        return hk.intercept_methods(meet)

    def apply(params: Any, inputs: PyTree, key: Any, weights: Any, what: str) -> Any:
        def module(*args: Any, **kwargs: Any) -> Any:
            return lifted.apply(params, state, key, *args, **kwargs)[0]

        # haiku mixes dtypes: its dropout multiplies by booleans
        with meeting(weights, what), jax.numpy_dtype_promotion("standard"):
            return module(inputs) if call is None else call(module, inputs, key)

    def start(key: Array) -> tuple[Any, Any]:
        if variables is not None:
            return variables
        inputs = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), example)

        def module(*args: Any, **kwargs: Any) -> Any:
            return lifted.init(key, *args, **kwargs)

        with meeting(None, "init"), jax.numpy_dtype_promotion("standard"):
            found = module(inputs) if call is None else call(module, inputs, None)
        return found[0], found[1]

    with met_first(call):
        drawn, state = start(jax.random.key(0))
    jax.eval_shape(lambda params, x: apply(params, x, None, None, "note"), drawn, example)
    name = choose([n for n in order if n in drawn], order, head)

    def is_head(path: str) -> bool:
        return name is not None and (path == name or path.startswith(f"{name}/"))

    def init(key: Array) -> Params:
        params = start(key)[0]
        head = {n: value for n, value in params.items() if is_head(n)}
        return {"body": {n: value for n, value in params.items() if n not in head}, "head": head}

    def body(
        params: Params, inputs: PyTree, weights: Float[Array, " examples"], key: Any = None
    ) -> Any:
        return apply(params, inputs, key, weights, "body")

    def apply_head(params: Params, features: Any) -> Any:
        if name is None:
            return features
        module, args, kwargs = called[name]
        alone = hk.transform_with_state(lambda x: module(x, *args, **kwargs))
        with meeting(None, "head"):
            return alone.apply(params, state, None, features)[0]

    def whole(params: Params, inputs: PyTree) -> Any:
        return apply({**params["body"], **params["head"]}, inputs, None, None, "whole")

    def dense(params: Params) -> Params:
        return {"kernel": params[name]["w"], "bias": params[name]["b"]}

    layer = called[name][0] if name is not None else None
    is_dense = isinstance(layer, hk.Linear) and layer.with_bias
    parts = Parts(init, body, apply_head, whole, name, dense if is_dense else None)
    return assemble(parts, example)


def _average(module: Any, inputs: Array, weights: Any) -> None:
    """Let a batch normalisation find the statistics of the pass where its averages are."""
    if weights is None:
        weights = jnp.ones(inputs.shape[0], inputs.dtype)
    mean, variance = batch_statistics(inputs, weights)
    module.mean_ema, module.var_ema = (SimpleNamespace(average=x) for x in (mean, variance))
