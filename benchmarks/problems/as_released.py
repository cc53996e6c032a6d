"""What the paper's authors ran: the data sets, the four methods, and every number of theirs.

Their code normalises support and query apart, starts the heads of Algorithm 1 and ITD-BiO from one
random head, and adapts nothing but heads except in MAML. Which of their 1,000, 2,000 and 4,000
iterations belong to which data set is not printed beside the table: taken to be as here.
"""

from dataclasses import replace
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

import memmeta as mm
from memmeta.few_shot.algorithms import Learner
from memmeta.models import Network

WAYS, SHOTS, QUERIES, TASKS = 5, 5, 5, 32
TEST_ROUNDS = 20
TEST_HEAD = mm.InnerLoop(optax.sgd(0.05), steps=20)

Method: TypeAlias = Literal["memory_reduced", "itd_bio", "anil", "maml"]
METHODS: tuple[Method, ...] = ("memory_reduced", "itd_bio", "anil", "maml")
FIXED_HEADS = ("memory_reduced", "itd_bio")
"""The methods whose head is not learned, and starts from one random head."""


class Setting(NamedTuple):
    """How the authors ran a data set.

    Attributes:
        data: its name.
        side: of an image, in pixels.
        width: filters of each convolution block.
        iterations: meta-steps.
        outer_rate: of Adam, constant.
        inner_rate: of Algorithm 1.
        anil_steps: inner steps of ANIL.
        to_one: whether pixels are scaled to [0, 1] or left at 0 to 255.
    """

    data: str
    side: int
    width: int
    iterations: int
    outer_rate: float
    inner_rate: float
    anil_steps: int
    to_one: bool


PRINTED = {
    "cifar_fs": {"maml": "71.5 ± 1.0 [1]"},
    "fc100": {"maml": "49.34 ± 0.97 [2]"},
    "mini_imagenet": {"maml": "63.11 ± 0.92 [1]", "anil": "61.5 ± 0.4 [3]"},
    "tiered_imagenet": {"maml": "70.30 ± 1.75 [1]", "anil": "65.82 ± 0.12 [4]"},
}
"""[1] Lee et al. (CVPR 2019), [2] Meta-Learning in Reproducing Kernel Hilbert Space (ICLR 2021),
[3] Raghu et al. (ICLR 2020), [4] Continuous-Time Meta-Learning with Forward Mode Differentiation
(ICLR 2022); their networks and sizes differ in part. The paper's own table is not at hand."""

SETTINGS = (
    Setting("cifar_fs", 32, 64, 2000, 1e-4, 0.1, 10, True),
    Setting("fc100", 32, 64, 1000, 1e-4, 0.1, 10, True),
    Setting("mini_imagenet", 84, 32, 4000, 1e-3, 0.05, 5, False),
    Setting("tiered_imagenet", 84, 32, 4000, 1e-3, 0.05, 5, True),
)
STAND_INS = (
    SETTINGS[0]._replace(data="glyphs"),
    SETTINGS[2]._replace(data="emoji"),
)
"""Embedded data drawn at the sizes of CIFAR-FS and of miniImageNet."""


def setting_of(data: str) -> Setting:
    """The setting of a data set; those that the authors did not use have that of CIFAR-FS."""
    return next((setting for setting in SETTINGS if setting.data == data), SETTINGS[0])


def network(
    setting: Setting, ways: int = WAYS, image_shape: tuple[int, int, int] | None = None
) -> Network:
    """Four blocks with learn2learn's initialisation, for images of the setting or another shape."""
    made = mm.models.conv4(
        ways,
        width=setting.width,
        image_shape=image_shape or (setting.side, setting.side, 3),
        head_scale=1.0,
        initialisation="xavier_uniform",
    )
    if setting.to_one:
        return made
    unscaled = lambda params, images, weights: made.body(  # noqa: E731
        params, images.astype(jnp.float32), weights
    )
    return replace(made, body=unscaled)


def fixed_head(model: Network, seed: int) -> PyTree:
    """The head that every task of Algorithm 1 and of ITD-BiO starts from."""
    key = jax.random.fold_in(jax.random.key(seed), 1)
    return jax.jit(model.init)(key)["head"]


def options(setting: Setting, method: Method, *, cached: bool) -> dict[str, Any]:
    """What a method is called with, but for the fixed head; see `learner`."""
    sgd = lambda rate, steps: mm.InnerLoop(optax.sgd(rate), steps=steps)  # noqa: E731
    recomputed = {"recompute_features": not cached}
    of_methods: dict[Method, dict[str, Any]] = {
        "memory_reduced": {"inner": sgd(setting.inner_rate, 20), "ridge": 0.0, "cg_steps": 20},
        "itd_bio": {"inner": sgd(0.1, 20), **recomputed},
        "anil": {"inner": sgd(0.1, setting.anil_steps), **recomputed},
        "maml": {"inner": sgd(0.5, 3)},
    }
    return {**of_methods[method], "statistics": "separate"}


def learner(setting: Setting, method: Method, seed: int, *, cached: bool) -> Learner:
    """One of the four methods.

    Args:
        setting: of the data set.
        method: its name.
        seed: of the fixed head.
        cached: whether the baselines make the features once a task or, as released, in every inner
            step: the same numbers but for rounding. Algorithm 1 needs no derivative of those steps,
            and makes them once.
    """
    model = network(setting)
    given = options(setting, method, cached=cached)
    if method in FIXED_HEADS:
        given["start"] = fixed_head(model, seed)
    return mm.algorithms.METHODS[method](model, **given)
