"""What is computed in which floating dtype."""

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped


def as_float(inputs: Shaped[Array, "..."], dtype: DTypeLike) -> Float[Array, "..."]:
    """Give `inputs` the floating dtype the body computes in; uint8 is scaled to [0, 1]."""
    if inputs.dtype == jnp.uint8:
        return inputs.astype(dtype) / jnp.asarray(255, dtype)
    return inputs.astype(dtype)


def at_least_float32(dtype: DTypeLike) -> DTypeLike:
    """The dtype sums are taken in: float32 for half precision, else `dtype` itself."""
    return jnp.float32 if jnp.finfo(dtype).bits < 32 else dtype
