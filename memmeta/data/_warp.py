"""Random affine maps of images, on the device."""

from dataclasses import dataclass, fields

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates
from jaxtyping import Array, Float, PRNGKeyArray, Shaped


@dataclass(frozen=True)
class Warp:
    r"""Rotate, stretch, shear and shift each image independently at random.

    $$x'(p) = x(A p + b), \quad
      A = \begin{pmatrix} \cos a & -\sin a \\ \sin a & \cos a \end{pmatrix}
          \begin{pmatrix} e^{s_1} & k \\ 0 & e^{s_2} \end{pmatrix}$$

    for pixels p = (down, right) relative to the image's centre. Between pixels x is interpolated
    bilinearly, and outside the image it is 0. a, s₁, s₂, k and b / side are drawn uniformly between
    plus and minus the arguments below.

    Args:
        angle: the largest rotation a, in radians.
        stretch: the largest logarithm s₁, s₂ of the two scales.
        shear: the largest shear k.
        shift: the largest shift b, as a fraction of the image's side.

    Raises:
        ValueError: an argument is negative.

    Example:
        >>> images = jnp.full((2, 8, 8, 1), 255, jnp.uint8)
        >>> warped = Warp(angle=0.1)(jax.random.key(0), images)
        >>> warped.shape, str(warped.dtype), int(warped[0, 4, 4, 0])
        ((2, 8, 8, 1), 'uint8', 255)
    """

    angle: float = 0.0
    stretch: float = 0.0
    shear: float = 0.0
    shift: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            if (value := getattr(self, field.name)) < 0:
                raise ValueError(f"{field.name}={value}: it must be 0 or more")

    def __call__(
        self, key: PRNGKeyArray, images: Shaped[Array, "images height width channels"]
    ) -> Shaped[Array, "images height width channels"]:
        """Warp a batch of images; a pure function.

        Args:
            key: the PRNG key.
            images: integer or floating-point images.

        Returns:
            The warped images, of the same dtype; integers are rounded.
        """
        drawn = jax.random.uniform(key, (len(images), 6), jnp.float32, -1, 1)
        return jax.vmap(self._warp)(images, drawn)

    def _warp(
        self, image: Shaped[Array, "height width channels"], drawn: Float[Array, " 6"]
    ) -> Shaped[Array, "height width channels"]:
        height, width, _ = image.shape
        middle = jnp.array([[height - 1], [width - 1]], jnp.float32) / 2
        places = jnp.indices((height, width), jnp.float32).reshape(2, -1) - middle
        side = jnp.array([height, width], jnp.float32)
        shift = self.shift * side * drawn[4:]
        sources = self._matrix(drawn) @ places + shift[:, None] + middle

        def sampled(channel: Shaped[Array, "height width"]) -> Shaped[Array, "height width"]:
            found = map_coordinates(channel.astype(jnp.float32), list(sources), order=1)
            found = found.reshape(height, width)
            exact = jnp.issubdtype(image.dtype, jnp.integer)
            return (jnp.round(found) if exact else found).astype(image.dtype)

        return jax.vmap(sampled, in_axes=-1, out_axes=-1)(image)

    def _matrix(self, drawn: Float[Array, " 6"]) -> Float[Array, "2 2"]:
        angle, shear = self.angle * drawn[0], self.shear * drawn[3]
        first, second = jnp.exp(self.stretch * drawn[1]), jnp.exp(self.stretch * drawn[2])
        turn = jnp.array([[jnp.cos(angle), -jnp.sin(angle)], [jnp.sin(angle), jnp.cos(angle)]])
        return turn @ jnp.array([[first, shear], [jnp.zeros_like(first), second]])
