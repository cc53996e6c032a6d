"""A multilayer perceptron, for regression and for small problems."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from memmeta.models._build import with_linear_head
from memmeta.models._dtypes import as_float
from memmeta.models._network import Network


class Hidden(nn.Module):
    """Dense layers with ReLU."""

    widths: tuple[int, ...]
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, inputs: Shaped[Array, "examples ..."], weights: Float[Array, " examples"]
    ) -> Float[Array, "examples features"]:
        """Features, float32; `weights` has nothing to weigh here."""
        hidden = as_float(inputs, self.dtype).reshape(inputs.shape[0], -1)
        for width in self.widths:
            hidden = nn.relu(nn.Dense(width, dtype=self.dtype, param_dtype=jnp.float32)(hidden))
        return hidden.astype(jnp.float32)


def mlp(
    outputs: int,
    widths: tuple[int, ...],
    input_shape: tuple[int, ...],
    *,
    head_scale: float = 1.0,
    dtype: DTypeLike = jnp.float32,
) -> Network:
    """Dense layers with ReLU, then a linear head. No batch statistics.

    Args:
        outputs: how many classes or regression targets.
        widths: units of each hidden layer; (40, 40) is MAML's for the sinusoids. () leaves a
            linear model.
        input_shape: shape of one example; it is flattened.
        head_scale: standard deviation of the head's kernel at the start, times sqrt(features);
            0 starts it from zeros.
        dtype: what the hidden layers compute in; parameters and the head stay float32.

    Returns:
        A `Network`.

    Source: Finn et al. 2017, section 5.1.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from memmeta.models import mlp
        >>> network = mlp(1, (40, 40), (1,))
        >>> params = network.init(jax.random.key(0))
        >>> features = network.body(params["body"], jnp.ones((7, 1)), jnp.ones(7))
        >>> network.head(params["head"], features).shape
        (7, 1)
    """
    return with_linear_head(Hidden(widths, dtype), outputs, input_shape, head_scale)
