"""Families of curves: sinusoids and tides against closed forms, and their sampler."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import memmeta.data
from memmeta.data import DataError, Episodes, Points, load, sampler

NAMES = ("sinusoid", "tides")
FILE = Path(memmeta.data.__file__).parent / "archives" / "tides.npz"


@pytest.fixture(scope="module")
def constants():
    """What was measured at the stations, as it is in the shipped file."""
    with np.load(FILE, allow_pickle=False) as arrays:
        return dict(arrays)


@pytest.mark.parametrize("name", NAMES)
def test_a_task_depends_on_its_number_alone(name):
    family, key = load(name, "train"), jax.random.key(0)
    spec = Points(shots=5, queries=7)
    spec.check(family)
    draw = jax.jit(spec.sample_batch, static_argnums=2)
    tasks = draw(family, key, 6, 0)
    assert tasks.support_inputs.shape == (6, 5, *family.example_shape)
    assert tasks.query_targets.shape == (6, 7, 1)
    for found, expected in zip(
        *map(jax.tree.leaves, (draw(family, key, 2, jnp.int32(4)), tasks)), strict=True
    ):
        assert found.dtype == jnp.float32
        np.testing.assert_array_equal(found, expected[4:])
    with jax.enable_x64(True):
        alone = spec.sample(family, jax.random.fold_in(key, 5))
    for found, expected in zip(*map(jax.tree.leaves, (alone, tasks)), strict=True):
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, expected[5], atol=1e-5)


def test_sinusoids_are_the_published_family():
    tasks = Points(5, 45).sample_batch(load("sinusoid", "train"), jax.random.key(1), 2000)
    x = np.concatenate([tasks.support_inputs, tasks.query_inputs], axis=1)[..., 0]
    y = np.concatenate([tasks.support_targets, tasks.query_targets], axis=1)[..., 0]
    assert -5 <= x.min() < -4.99
    assert 4.99 < x.max() <= 5
    # y = a sin(x) + b cos(x), solved for a = A cos(phase) and b = -A sin(phase)
    features = np.stack([np.sin(x), np.cos(x)], axis=-1)
    found = np.linalg.lstsq(features.reshape(-1, 2), y.ravel(), rcond=None)[0]
    assert np.isfinite(found).all()
    solved = np.array(
        [np.linalg.lstsq(f, t, rcond=None)[0] for f, t in zip(features, y, strict=True)]
    )
    np.testing.assert_allclose(np.einsum("tpi,ti->tp", features, solved), y, atol=1e-4)
    amplitude, phase = np.hypot(*solved.T), np.arctan2(-solved[:, 1], solved[:, 0])
    assert 0.1 - 1e-4 < amplitude.min() < 0.15
    assert 4.95 < amplitude.max() < 5 + 1e-4
    assert -1e-3 < phase.min() < 0.02
    assert np.pi - 0.02 < phase.max() < np.pi + 1e-3
    assert abs(amplitude.mean() - 2.55) < 4 * 4.9 / np.sqrt(12 * 2000)
    assert abs(phase.mean() - np.pi / 2) < 4 * np.pi / np.sqrt(12 * 2000)


@given(
    station=st.integers(0, 442),
    day=st.integers(0, 6939),
    hour=st.floats(0, 48, width=32),
)
@settings(max_examples=50, deadline=None)
def test_heights_are_the_harmonic_sum_in_float64(constants, station, day, hour):
    family = load("tides", "test")
    row = np.flatnonzero(constants["split"] == "test")[station]
    amplitude = constants["amplitude"][row].astype(np.float64)
    degrees = (
        constants["argument"]
        + constants["speed"] * (24 * day + hour)
        - constants["phase"][row].astype(np.float64) / 10
    )
    expected = (amplitude * np.cos(np.deg2rad(degrees % 360))).sum()
    expected /= np.sqrt((amplitude**2).sum() / 2)
    found = family.height(station, day, jnp.float32(hour))
    np.testing.assert_allclose(found, expected, atol=3e-5)


def test_heights_in_units_of_the_stations_deviation():
    tasks = Points(5, 45).sample_batch(load("tides", "train"), jax.random.key(2), 4000)
    assert abs(np.asarray(tasks.query_inputs)).max() <= 1
    heights = np.asarray(tasks.query_targets)
    assert abs(heights.mean()) < 0.1
    assert abs(heights.var() - 1) < 0.1


def test_no_station_is_in_two_splits(constants):
    assert len(set(constants["station"].tolist())) == len(constants["station"]) == 1246
    numbers = {
        split: (constants["split"] == split).sum() for split in ("train", "validation", "test")
    }
    assert numbers == {"train": 703, "validation": 100, "test": 443}
    for split, number in numbers.items():
        assert len(load("tides", split).station_names) == number
    assert FILE.stat().st_size < 200_000


def test_training_stations_are_of_the_atlantic_and_test_stations_of_the_pacific(constants):
    """By NOAA's numbers: 8 is the Atlantic and Gulf coast, 94 the Pacific coast and Alaska."""
    test = constants["split"] == "test"
    assert not test[constants["station"] // 1_000_000 == 8].any()
    assert test[constants["station"] // 100_000 == 94].all()
    assert (constants["station"][test] // 100_000 == 94).mean() > 0.9
    assert (constants["station"][~test] // 1_000_000 == 8).mean() > 0.9


def test_speeds_of_compound_tides_are_sums(constants):
    speed = dict(zip(constants["constituent_names"].tolist(), constants["speed"], strict=True))
    assert len(speed) == 37
    np.testing.assert_allclose(speed["M2"], 28.984104, atol=1e-6)
    np.testing.assert_allclose(speed["K1"], 15.041069, atol=1e-6)
    np.testing.assert_allclose(speed["MN4"], speed["M2"] + speed["N2"])
    np.testing.assert_allclose(speed["2MK3"], 2 * speed["M2"] - speed["K1"])
    np.testing.assert_allclose(speed["MSF"], speed["S2"] - speed["M2"])


def test_spring_tides_follow_new_and_full_moon(constants):
    """M2 and S2 come together at new moon (2000-01-06 18:14 UTC) in the equilibrium tide."""
    names = constants["constituent_names"].tolist()
    angles = [
        constants["argument"][names.index(n)]
        + constants["speed"][names.index(n)] * (5 * 24 + 18.23)
        for n in ("M2", "S2")
    ]
    difference = (angles[0] - angles[1] + 180) % 360 - 180
    assert abs(difference) < 14  # the true moon is up to 6.3 degrees from the mean one, doubled


def test_curves_have_points_and_classes_have_episodes():
    family = load("tides", "train")
    assert sampler(family, ways=20, shots=10, queries=50) == Points(10, 50)
    for name in ("within_group", "cross_family"):
        with pytest.raises(DataError, match=rf"tides has curves: .*{name}"):
            sampler(family, **{name: True})
    glyphs = load("glyphs", "test")
    assert sampler(glyphs, ways=3, shots=2).ways == 3
    assert sampler(glyphs, within_group=False, cross_family=True) == Episodes(
        shots=5, within_group=False, cross_family=True
    )


@pytest.mark.parametrize("name", ["shots", "queries"])
def test_figures_must_be_positive_integers(name):
    with pytest.raises(ValueError, match=f"{name}=0: it must be a positive integer"):
        Points(**{name: 0})
