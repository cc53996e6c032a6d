"""The interface between a network and the algorithms: a body and a head, as pure functions."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from jaxtyping import Array, Float, Key, PyTree, Shaped

Params: TypeAlias = PyTree[Any]
Features: TypeAlias = PyTree[Any]
"""[examples, ...] of what the body makes and the head reads; for most heads one matrix."""
Outputs: TypeAlias = PyTree[Any]


@dataclass(frozen=True)
class Network:
    """A network as pure functions: a body that makes features and a head that reads them.

    outputs = head(params["head"], body(params["body"], inputs, weights, key=key))

    `from_linen`, `from_nnx`, `from_equinox` and `from_haiku` make one of a module of the user's;
    plain functions are used by filling in the fields.

    Attributes:
        init: PRNG key -> {"body": ..., "head": ...}, two pytrees of float arrays.
        body: (body_params, inputs, weights) -> features of the examples, any pytree of arrays whose
            leading axis is theirs; float32 (examples, features) for a linear head. `weights`,
            (examples,), says which examples give the batch statistics; a body without any may
            ignore it. A body that has an argument `key` is given a PRNG key by name where the task
            has one, `task.extras["key"]`: then noise such as dropout is on, and without it off.
        head: (head_params, features) -> outputs, float32, (examples, ways); of any other kind where
            the loss is the user's own.
        features: how many features the body makes of one example; None if they are no vector.
        ways: how many outputs the head has: classes, or regression targets.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from memmeta.models import Network
        >>> network = Network(
        ...     init=lambda key: {"body": (), "head": {"kernel": jax.random.normal(key, (4, 2))}},
        ...     body=lambda params, images, weights: images.reshape(images.shape[0], -1),
        ...     head=lambda params, features: features @ params["kernel"],
        ...     features=4,
        ...     ways=2,
        ... )
        >>> params = network.init(jax.random.key(0))
        >>> features = network.body(params["body"], jnp.ones((3, 2, 2, 1)), jnp.ones(3))
        >>> network.head(params["head"], features).shape
        (3, 2)
    """

    init: Callable[[Array], Params]
    body: Callable[..., Features]
    head: Callable[[Params, Features], Outputs]
    features: int | None
    ways: int

    def noisy_body(
        self,
        params: Params,
        inputs: PyTree[Shaped[Array, "examples ..."]],
        weights: Float[Array, " examples"],
        key: Key[Array, ""] | None,
    ) -> Features:
        """The features, with the key where there is one and the body takes it."""
        if key is None or "key" not in inspect.signature(self.body).parameters:
            return self.body(params, inputs, weights)
        return self.body(params, inputs, weights, key=key)
