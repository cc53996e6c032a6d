r"""What `benchmarks.accuracy.methods` runs: settings, their sizes, and each method's presets.

"tuned": ours: the library's defaults, and for regression inner loops and ridges of their own, set
by hand and not searched for. "authors": as the authors of "Memory-Reduced Meta-Learning with
Guaranteed Convergence" (AAAI 2025) ran their method and, as far as is known here, their baselines;
the baselines' rate of Adam is taken to be that of the method. "same_inner": ANIL and ITD-BiO with
the steps and the ridge of memory_reduced, so that the estimator alone is compared.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, TypeAlias

import optax

import memmeta as mm
from benchmarks.accuracy import regression
from memmeta.data import Dataset
from memmeta.few_shot import Statistics
from memmeta.few_shot.algorithms import METHODS, Learner
from memmeta.models import conv4, mlp

Split: TypeAlias = Any
"""What `memmeta.data.load` returns: a `Dataset`, or a family of curves."""
Preset: TypeAlias = Literal["tuned", "authors", "same_inner"]
CURVES = ("tides", "sinusoid")


class Setting(NamedTuple):
    """A kind of task: `ways` classes of `shots` support images, or `shots` points of a curve."""

    data: str
    ways: int
    shots: int

    @property
    def curves(self) -> bool:
        """Whether the tasks are regressions."""
        return self.data in CURVES

    def __str__(self) -> str:
        if self.curves:
            return f"{self.data}, {self.shots} points"
        return f"{self.data}, {self.ways}-way {self.shots}-shot"


class Sizes(NamedTuple):
    """How large the network and the batches are, and how long every method trains."""

    width: int = 32  # filters of each convolution block, or units of each of two hidden layers
    tasks: int = 8  # in a meta-step
    chunk: int = 4  # tasks worked on at once
    queries: int = 5  # of a class in training, or points of a curve
    test_queries: int = 5
    seconds: float = 20.0  # of training
    episodes: int = 600  # at test
    meta_steps: int | None = None  # None: as many as fit into `seconds`

    def quick(self) -> "Sizes":
        """To see in seconds that everything works."""
        queries = min(self.queries, 2)
        return Sizes(8, 2, 2, queries, queries, 0.0, episodes=20, meta_steps=3)


SETTINGS: dict[Setting, Sizes] = {
    Setting("glyphs", 5, 1): Sizes(test_queries=3, seconds=6),
    Setting("glyphs", 20, 1): Sizes(tasks=4, queries=3, test_queries=1, seconds=10),
    Setting("glyphs", 5, 5): Sizes(test_queries=3, seconds=6),
    Setting("glyphs", 20, 5): Sizes(tasks=4, chunk=2, queries=3, test_queries=1, seconds=10),
    Setting("tides", 1, 5): Sizes(64, 16, 16, 20, 50, 2),
    Setting("tides", 1, 10): Sizes(64, 16, 16, 20, 50, 2),
}
"""Those that run without further data."""

OTHERS = Sizes(width=64, tasks=32, chunk=4, queries=5, test_queries=15, seconds=3600)
IMAGENETS = ("mini_imagenet", "tiered_imagenet")


def sizes_of(setting: Setting) -> Sizes:
    """The sizes of a setting; those of data sets that are not embedded are the authors'."""
    width = 32 if setting.data in IMAGENETS else OTHERS.width
    return SETTINGS.get(setting, OTHERS._replace(width=width))


@dataclass(frozen=True)
class Recipe:
    """How a method is run."""

    rate: float = 3e-3  # of Adam, the outer optimiser
    inner: mm.InnerLoop | None = None  # in training; None: the method's own
    options: Mapping[str, Any] = field(default_factory=dict)  # others of the method
    cosine: bool = True  # whether the rate falls to zero along a cosine
    test: mm.InnerLoop | None = None  # at test; None: as in training


STEPS = mm.InnerLoop(optax.sgd(0.05), steps=5)
LEARNED_RATES = replace(METHODS["meta_sgd"](mlp(1, (), (1,))).inner, steps=5)
WEAK_RIDGE = Recipe(options={"ridge": 0.01})
TUNED_CURVES: dict[str, Recipe] = {
    **dict.fromkeys(("memory_reduced", "stocbio", "amigo", "pzobo"), WEAK_RIDGE),
    **dict.fromkeys(("maml", "fomaml", "reptile", "boil"), Recipe(inner=STEPS)),
    "meta_sgd": Recipe(inner=LEARNED_RATES, options={"first_rate": 0.05}),
    "imaml": Recipe(options={"proximal": 0.5}),
}


def tuned(setting: Setting, method: str) -> Recipe:
    """Ours: a method's defaults, unless it is in `TUNED_CURVES`."""
    return TUNED_CURVES.get(method, Recipe()) if setting.curves else Recipe()


def authors(setting: Setting, method: str) -> Recipe:
    """As the paper's authors ran it on CIFAR-FS and FC100, or on mini- and tieredImageNet.

    Baselines recompute the features in each inner step. Data sets that they did not use have the
    recipe of CIFAR-FS. ANIL's 5 steps, instead of 10, are taken to be those of the ImageNets.

    Raises:
        ValueError: they did not run the method, or not on such tasks.
    """
    larger = setting.data in IMAGENETS
    inner_rate, rate = (0.05, 1e-3) if larger else (0.1, 1e-4)
    recomputed, as_released = {"recompute_features": True}, {"ridge": 0.0, "cg_steps": 20}

    def recipe(inner_rate: float, steps: int, options: Any = None, test: Any = None) -> Recipe:
        return Recipe(rate, mm.InnerLoop(optax.sgd(inner_rate), steps), options or {}, False, test)

    recipes: dict[str, Recipe] = {
        "memory_reduced": recipe(inner_rate, 20, as_released, mm.InnerLoop(optax.sgd(0.05), 20)),
        "maml": recipe(0.5, 3),
        "anil": recipe(0.1, 5 if larger else 10, recomputed),
        "itd_bio": recipe(0.1, 20, recomputed),
    }
    if method not in recipes or setting.curves:
        raise ValueError(
            f"preset: the authors ran {', '.join(recipes)} on classes, found {method} on "
            f"{setting.data}; use the preset 'tuned'."
        )
    return recipes[method]


def same_inner(setting: Setting, method: str) -> Recipe:
    """The inner loop and the ridge that memory_reduced has by default.

    Raises:
        ValueError: the method is none that differentiates the steps of a head.
    """
    if method not in ("anil", "itd_bio") or setting.curves:
        raise ValueError(
            f"preset: same_inner is for anil and itd_bio on classes, found {method} on "
            f"{setting.data}; use the preset 'tuned'."
        )
    return Recipe(inner=mm.InnerLoop(steps=50), options={"ridge": 0.1})


def recipe_of(preset: Preset, setting: Setting, method: str) -> Recipe:
    """A method's recipe; raises as `authors` and `same_inner` do."""
    recipes = {"tuned": tuned, "authors": authors, "same_inner": same_inner}
    return recipes[preset](setting, method)


def methods_of(setting: Setting, preset: Preset = "tuned") -> list[str]:
    """The methods that make sense."""
    if preset != "tuned":
        baselines: list[str] = ["anil", "itd_bio"]
        return ["memory_reduced", "maml", *baselines] if preset == "authors" else baselines
    return [name for name in METHODS if not (setting.curves and name in regression.WITHOUT)]


def make_learner(
    setting: Setting,
    sizes: Sizes,
    dataset: Split,
    method: str,
    recipe: Recipe,
    statistics: Statistics = "transductive",
) -> Learner:
    """The method on a network that fits the data, with batch statistics at test of one kind."""
    options = dict(recipe.options) | ({} if recipe.inner is None else {"inner": recipe.inner})
    if not isinstance(dataset, Dataset):
        widths = (sizes.width, sizes.width)
        return regression.learner(method, mlp(1, widths, dataset.example_shape), **options)
    height, width, channels = dataset.example_shape
    network = conv4(
        setting.ways,
        width=sizes.width,
        image_shape=(height, width, channels),
        head_scale=1.0,  # read only by methods that learn the head's start
    )
    return METHODS[method](network, statistics=statistics, **options)
