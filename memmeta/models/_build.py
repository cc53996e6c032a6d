"""A network from a flax body and a linear head."""

from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from memmeta._shared import checks
from memmeta.models._network import Network, Params

REMEDY = (
    "memmeta.models.from_linen takes modules with state, noise or other arguments: give it the "
    "whole module, its last layer included."
)


def linear_head(
    params: dict[str, Float[Array, "..."]], features: Float[Array, "examples features"]
) -> Float[Array, "examples ways"]:
    """Outputs = features @ kernel + bias."""
    return features @ params["kernel"] + params["bias"]


def with_linear_head(
    body: nn.Module, ways: int, input_shape: tuple[int, ...], head_scale: float
) -> Network:
    """Join a flax body and a linear head into a `Network`.

    Args:
        body: module of call (inputs, weights) -> (examples, features), float32, with parameters
            alone. `from_linen` takes modules of any other kind.
        ways: how many outputs.
        input_shape: shape of one example, without the leading axis.
        head_scale: standard deviation of the head's kernel at the start, times sqrt(features);
            0 starts every task's head from zeros.

    Returns:
        The network.

    Raises:
        ValueError: `ways` is less than 1, `head_scale` is negative, or the body is of another kind.

    Example:
        >>> from memmeta.models import with_linear_head
        >>> class Body(nn.Module):
        ...     @nn.compact
        ...     def __call__(self, inputs, weights):
        ...         return nn.relu(nn.Dense(8)(inputs))
        >>> with_linear_head(Body(), ways=5, input_shape=(3,), head_scale=0.0).features
        8
    """
    checks.count("ways", ways)
    checks.not_negative("head_scale", head_scale)
    example = jax.ShapeDtypeStruct((1, *input_shape), jnp.float32)
    weight = jax.ShapeDtypeStruct((1,), jnp.float32)
    try:
        variables = jax.eval_shape(body.init, jax.random.key(0), example, weight)
        features = jax.eval_shape(body.apply, variables, example, weight).shape[1]
    except Exception as error:
        raise ValueError(f"body: {error}. {REMEDY}") from error
    if set(variables) - {"params"}:
        found = ", ".join(sorted(set(variables) - {"params"}))
        raise ValueError(f"body: found the collections {found}, expected params alone. {REMEDY}")

    def init(key: Array) -> Params:
        body_key, head_key = jax.random.split(key)
        variables = body.lazy_init(body_key, example, weight)
        kernel = head_scale * features**-0.5 * jax.random.normal(head_key, (features, ways))
        return {
            "body": variables.get("params", {}),
            "head": {"kernel": kernel, "bias": jnp.zeros(ways)},
        }

    def apply_body(
        params: Params, inputs: Shaped[Array, "examples ..."], weights: Float[Array, " examples"]
    ) -> Float[Array, "examples features"]:
        return cast(Array, body.apply({"params": params}, inputs, weights))

    return Network(init, apply_body, linear_head, features, ways)
