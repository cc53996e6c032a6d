"""Batch normalisation by the statistics of the batch itself, never of a running average."""

import flax.linen as nn
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from memmeta._shared.trees import accumulator

EPSILON = 1e-5


def batch_statistics(
    inputs: Float[Array, "examples *positions channels"], weights: Float[Array, " examples"]
) -> tuple[Float[Array, " channels"], Float[Array, " channels"]]:
    """Weighted mean and variance of every channel over examples and positions.

    mean = sum_n p_n mean_s x[n, s],  variance = sum_n p_n mean_s (x[n, s] - mean)^2,
    p = weights / sum(weights)

    Args:
        inputs: x, any floating dtype; the sums are float32 or wider.
        weights: how much each example counts, at least zero. Ones: transductive. Ones for the
            support and zeros for the query: inductive. Zeros also leave padding out.

    Returns:
        Mean and variance; zeros if all weights are zero.

    Example:
        >>> inputs = 3e4 + jnp.array([[0.0], [1.0], [2.0], [50.0]])
        >>> mean, variance = batch_statistics(inputs, jnp.array([2.0, 0.0, 2.0, 0.0]))
        >>> mean.tolist(), variance.tolist()
        ([30001.0], [1.0])
    """
    positions = tuple(range(1, inputs.ndim - 1))
    wide = inputs.astype(accumulator(inputs.dtype))
    total = weights.sum()
    share = (weights / jnp.where(total > 0, total, 1)).astype(wide.dtype)
    mean = share @ wide.mean(positions)
    # Squares around a constant that happens to be the mean: the last term is zero, and with it its
    # first derivative, which spares the backward pass a sweep through `inputs`.
    centre = lax.stop_gradient(mean)
    variance = share @ jnp.square(wide - centre).mean(positions) - jnp.square(mean - centre)
    return mean, variance


def normalise(
    inputs: Float[Array, "examples *positions channels"],
    mean: Float[Array, " channels"],
    variance: Float[Array, " channels"],
    scale: Float[Array, " channels"],
    bias: Float[Array, " channels"],
) -> Float[Array, "examples *positions channels"]:
    """scale * (inputs - mean) / sqrt(variance + 1e-5) + bias, of the inputs' dtype."""
    factor = scale.astype(mean.dtype) * lax.rsqrt(variance + EPSILON)
    shift = bias.astype(mean.dtype) - mean * factor
    return (inputs.astype(mean.dtype) * factor + shift).astype(inputs.dtype)


class BatchNorm(nn.Module):
    """Normalise by the batch's own statistics, then scale and shift by learned parameters.

    y = scale * (x - mean) / sqrt(variance + 1e-5) + bias

    The learned parameters are `scale` (ones at the start) and `bias` (zeros), float32.
    """

    @nn.compact
    def __call__(
        self,
        inputs: Float[Array, "examples *positions channels"],
        weights: Float[Array, " examples"],
    ) -> Float[Array, "examples *positions channels"]:
        """Normalise `inputs` by the statistics that `weights` picks; same shape and dtype."""
        channels = (inputs.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, channels, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, channels, jnp.float32)
        return normalise(inputs, *batch_statistics(inputs, weights), scale, bias)
