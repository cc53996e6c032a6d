"""The interface between a network and the algorithms: a body and a head, as pure functions."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from jaxtyping import Array, Float, PyTree, Shaped

Params: TypeAlias = PyTree[Any]


@dataclass(frozen=True)
class Network:
    """A network as pure functions: a body that makes features and a head that reads them.

    logits = head(params["head"], body(params["body"], images, weights))

    A network of any library (flax nnx, equinox, plain functions) is used by filling in the fields.

    Attributes:
        init: PRNG key -> {"body": ..., "head": ...}, two pytrees of float arrays.
        body: (body_params, images, weights) -> features, float32, (examples, features). `weights`,
            (examples,), says which examples give the batch statistics; a body without any may
            ignore it.
        head: (head_params, features) -> outputs, float32, (examples, ways).
        features: how many features the body makes of one image.
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
    body: Callable[
        [Params, Shaped[Array, "examples ..."], Float[Array, " examples"]],
        Float[Array, "examples features"],
    ]
    head: Callable[[Params, Float[Array, "examples features"]], Float[Array, "examples ways"]]
    features: int
    ways: int
