"""`sinusoid`: the classic regression tasks of MAML, generated on the device."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray


@jax.tree_util.register_dataclass
@no_type_check  # JAX also builds it with placeholders for the arrays: shapes, axes, shardings
@dataclass(frozen=True)
class Sinusoid:
    r"""Sine curves of random amplitude and phase.

    $$y = A \sin(x - b), \qquad A \sim U[0.1, 5], \; b \sim U[0, \pi], \; x \sim U[-5, 5]$$

    Args:
        amplitude: `[2]`, the smallest and the largest A.
        phase: `[2]`, the smallest and the largest b, in radians.
        split: "train", "validation" or "test"; all three are the same family, as in the source,
            and their tasks differ only by the key they are drawn with.
        name: the data set's name.

    Source: Finn, Abbeel, Levine (ICML 2017), section 5.1.
    """

    amplitude: Float[Array, " 2"]
    phase: Float[Array, " 2"]
    split: str = field(metadata={"static": True})
    name: str = field(default="sinusoid", metadata={"static": True})

    @property
    def example_shape(self) -> tuple[int, ...]:
        """The shape of one input."""
        return (1,)

    def draw(
        self, key: PRNGKeyArray, points: int
    ) -> tuple[Float[Array, "points 1"], Float[Array, "points 1"]]:
        """Draw one curve and points on it.

        Args:
            key: the PRNG key.
            points: how many points.

        Returns:
            Inputs x and targets y, float32.
        """
        amplitude_key, phase_key, input_key = jax.random.split(key, 3)
        inputs = jax.random.uniform(input_key, (points, 1), jnp.float32, -5.0, 5.0)
        phase = _between(phase_key, self.phase)
        return inputs, _between(amplitude_key, self.amplitude) * jnp.sin(inputs - phase)


def _between(key: PRNGKeyArray, ends: Float[Array, " 2"]) -> Float[Array, ""]:
    return ends[0] + (ends[1] - ends[0]) * jax.random.uniform(key, (), jnp.float32)


def load_sinusoid(split: str, data_dir: Path | None) -> Sinusoid:
    """The sine curves of the source's experiments, the same family for every split.

    Args:
        split: "train", "validation" or "test".
        data_dir: not used; nothing is stored.

    Returns:
        The family.

    Example:
        >>> inputs, targets = load_sinusoid("test", None).draw(jax.random.key(0), 3)
        >>> inputs.shape, targets.shape
        ((3, 1), (3, 1))
    """
    del data_dir
    amplitude, phase = jnp.array([0.1, 5.0], jnp.float32), jnp.array([0.0, jnp.pi], jnp.float32)
    return Sinusoid(amplitude, phase, split)
