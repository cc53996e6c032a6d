"""The dtype of a network's inputs."""

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped


def as_float(inputs: Shaped[Array, "..."], dtype: DTypeLike) -> Float[Array, "..."]:
    """Give `inputs` the floating dtype the body computes in; uint8 is scaled to [0, 1]."""
    if inputs.dtype == jnp.uint8:
        return inputs.astype(dtype) / jnp.asarray(255, dtype)
    return inputs.astype(dtype)
