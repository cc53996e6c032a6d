"""`tides`: the water level at real tide stations, from measured harmonic constants.

`archives/tides.md` says where the constants are from and how the stations are split.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, PRNGKeyArray, UInt32

from memmeta.data._archive import read_archive

WINDOW = 24.0  # hours
DAYS = 6940  # 19 years, after which sun and moon come back to nearly the same places


@jax.tree_util.register_dataclass
@no_type_check  # JAX also builds it with placeholders for the arrays: shapes, axes, shardings
@dataclass(frozen=True)
class Tides:
    r"""The tide at a random station in a random window of 24 hours.

    $$y(t) = \frac1\sigma \sum_c A_c \cos(\text{speed}_c \, t + \phi_c), \qquad
      \sigma^2 = \tfrac12 \sum_c A_c^2$$

    The input is the time within the window, from -1 at its start to 1 at its end. The target is the
    height above mean sea level, divided by the station's own standard deviation σ, so that a mean
    squared error is a fraction of the variance. Windows start at any time in the 19 years from 2000
    on.

    Args:
        amplitude: A / σ of each station and constituent.
        phase: φ at 2000-01-01 00:00 UTC, as a whole number of 2⁻³² turns; integers, so that the
            phase after any number of days is exact.
        turns_a_day: the change of φ in one day, as a whole number of 2⁻³² turns.
        speed: of each constituent, in radians per hour.
        split: "train", "validation" or "test"; no station is in two splits.
        station_names: the name of each station.
        name: the data set's name.
    """

    amplitude: Float32[Array, "stations constituents"]
    phase: UInt32[Array, "stations constituents"]
    turns_a_day: UInt32[Array, " constituents"]
    speed: Float32[Array, " constituents"]
    split: str = field(metadata={"static": True})
    station_names: tuple[str, ...] = field(metadata={"static": True})
    name: str = field(default="tides", metadata={"static": True})

    @property
    def example_shape(self) -> tuple[int, ...]:
        """The shape of one input."""
        return (1,)

    def draw(
        self, key: PRNGKeyArray, points: int
    ) -> tuple[Float[Array, "points 1"], Float[Array, "points 1"]]:
        """Draw a station, a window, and points in the window.

        Args:
            key: the PRNG key.
            points: how many points.

        Returns:
            Inputs in [-1, 1] and heights in units of σ, float32.
        """
        station_key, day_key, hour_key, input_key = jax.random.split(key, 4)
        station = jax.random.randint(station_key, (), 0, self.amplitude.shape[0], jnp.int32)
        day = jax.random.randint(day_key, (), 0, DAYS, jnp.int32)
        start = jax.random.uniform(hour_key, (), jnp.float32, 0.0, 24.0)
        inputs = jax.random.uniform(input_key, (points, 1), jnp.float32, -1.0, 1.0)
        return inputs, self.height(station, day, start + WINDOW / 2 * (inputs + 1))

    def height(
        self, station: int | Array, day: int | Array, hours: Float[Array, "*times"]
    ) -> Float32[Array, "*times"]:
        """The height at one station, in units of its standard deviation.

        Args:
            station: the station's index.
            day: days since 2000-01-01.
            hours: hours since 00:00 UTC of that day; at most a few days' worth, so that float32
                stays accurate.

        Returns:
            The height at each time.
        """
        # uint32 arithmetic wraps at 2^32, which drops whole turns without a rounding error
        turns = self.phase[station] + jnp.asarray(day).astype(jnp.uint32) * self.turns_a_day
        phase = turns.astype(jnp.float32) * jnp.float32(2 * np.pi / 2**32)
        waves = jnp.cos(hours[..., None].astype(jnp.float32) * self.speed + phase)
        return (waves * self.amplitude[station]).sum(axis=-1)


def load_tides(split: str, data_dir: Path | None) -> Tides:
    """The stations of one split: train and validation on the Atlantic side, test on the Pacific's.

    Args:
        split: "train", "validation" or "test".
        data_dir: not used; the archive is inside the package.

    Returns:
        The tide curves of the split's stations.

    Raises:
        DataError: the archive is missing, truncated or altered.

    Example:
        >>> tides = load_tides("test", None)
        >>> len(tides.station_names), tides.station_names[0]
        (443, 'Port Allen')
        >>> inputs, heights = tides.draw(jax.random.key(0), 5)
        >>> inputs.shape, heights.shape
        ((5, 1), (5, 1))
    """
    del data_dir
    arrays = read_archive("tides")
    chosen = arrays["split"] == split
    amplitude = arrays["amplitude"][chosen].astype(np.float64)
    amplitude /= np.sqrt((amplitude**2).sum(axis=1, keepdims=True) / 2)
    phase = arrays["argument"] - arrays["phase"][chosen].astype(np.float64) / 10
    return Tides(
        amplitude=jnp.asarray(amplitude.astype(np.float32)),
        phase=jnp.asarray(_turns(phase)),
        turns_a_day=jnp.asarray(_turns(24 * arrays["speed"])),
        speed=jnp.asarray(np.deg2rad(arrays["speed"]).astype(np.float32)),
        split=split,
        station_names=tuple(str(name) for name in arrays["station_names"][chosen]),
    )


def _turns(degrees: np.ndarray) -> np.ndarray:
    """Convert degrees to whole numbers of 2⁻³² turns, modulo one turn."""
    return (np.round(degrees / 360 % 1 * 2**32).astype(np.int64) % 2**32).astype(np.uint32)
