"""What the paper's authors ran: the data sets, the four methods, and every number of theirs.

Their code normalises support and query apart, starts the heads of Algorithm 1 and ITD-BiO from one
random head, and adapts nothing but heads except in MAML. Which of their 1,000, 2,000 and 4,000
iterations belong to which data set is not printed beside the table: taken to be as here.
"""

from dataclasses import replace
from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree
from memmeta.algorithms import Learner

import memmeta as mm
from memmeta.models import Network

WAYS, SHOTS, QUERIES, TASKS = 5, 5, 5, 32
TEST_ROUNDS = 20
TEST_HEAD = mm.InnerLoop(optax.sgd(0.05), steps=20)

Method: TypeAlias = Literal["memory_reduced", "itd_bio", "anil", "maml"]
METHODS: tuple[Method, ...] = ("memory_reduced", "itd_bio", "anil", "maml")


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
        printed: accuracies that others printed for the baselines, 5-way 5-shot.
    """

    data: str
    side: int
    width: int
    iterations: int
    outer_rate: float
    inner_rate: float
    anil_steps: int
    to_one: bool
    printed: dict[str, str]


LEE = "Lee et al., CVPR 2019"
SETTINGS = (
    Setting(
        "cifar_fs", 32, 64, 2000, 1e-4, 0.1, 10, True, {"maml": f"71.5 ± 1.0 ({LEE}, Table 2)"}
    ),
    Setting(
        "fc100",
        32,
        64,
        1000,
        1e-4,
        0.1,
        10,
        True,
        {"maml": "49.34 ± 0.97 (ICLR 2021 RKHS, Table 2)"},
    ),
    Setting(
        "mini_imagenet",
        84,
        32,
        4000,
        1e-3,
        0.05,
        5,
        False,
        {"maml": f"63.11 ± 0.92 ({LEE}, Table 1)", "anil": "61.5 ± 0.4 (Raghu et al., ICLR 2020)"},
    ),
    Setting(
        "tiered_imagenet",
        84,
        32,
        4000,
        1e-3,
        0.05,
        5,
        True,
        {"maml": f"70.30 ± 1.75 ({LEE}, Table 1)"},
    ),
)
STAND_INS = (
    SETTINGS[0]._replace(data="glyphs", printed={}),
    SETTINGS[2]._replace(data="emoji", printed={}),
)
"""Embedded data drawn at the sizes of CIFAR-FS and of miniImageNet."""


def network(setting: Setting) -> Network:
    """Four blocks with learn2learn's initialisation."""
    made = mm.models.conv4(
        WAYS,
        width=setting.width,
        image_shape=(setting.side, setting.side, 3),
        head_scale=1.0,
        initialisation="xavier_uniform",
    )
    if setting.to_one:
        return made
    unscaled = lambda params, images, weights: made.body(  # noqa: E731
        params, images.astype(jnp.float32), weights
    )
    return replace(made, body=unscaled)


def fixed_head(setting: Setting, seed: int) -> PyTree:
    """The head that every task of Algorithm 1 and of ITD-BiO starts from."""
    key = jax.random.fold_in(jax.random.key(seed), 1)
    return jax.jit(network(setting).init)(key)["head"]


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
    model, start = network(setting), fixed_head(setting, seed)
    sgd = lambda rate, steps: mm.InnerLoop(optax.sgd(rate), steps=steps)  # noqa: E731
    if method == "maml":
        return mm.algorithms.maml(model, inner=sgd(0.5, 3), statistics="separate")
    if method == "anil":
        return mm.algorithms.anil(
            model,
            inner=sgd(0.1, setting.anil_steps),
            recompute_features=not cached,
            statistics="separate",
        )
    if method == "itd_bio":
        return mm.algorithms.itd_bio(
            model,
            inner=sgd(0.1, 20),
            recompute_features=not cached,
            statistics="separate",
            start=start,
        )
    return mm.algorithms.memory_reduced(
        model,
        inner=sgd(setting.inner_rate, 20),
        ridge=0.0,
        cg_steps=20,
        statistics="separate",
        start=start,
    )
