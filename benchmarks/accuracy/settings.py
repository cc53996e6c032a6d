r"""What `benchmarks.accuracy.methods` runs: settings, their sizes, and each method's presets.

"tuned": ours: the library's defaults, and for regression inner loops and ridges of their own, set
by hand and not searched for. "authors": as the authors of "Memory-Reduced Meta-Learning with
Guaranteed Convergence" (AAAI 2025) ran their method and their baselines, by the numbers of
`benchmarks.reproduce`, at the sizes of the setting here. "same_inner": ANIL and ITD-BiO with
the steps and the ridge of memory_reduced, so that the estimator alone is compared.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, TypeAlias

import optax

import memmeta as mm
from benchmarks.accuracy import regression
from benchmarks.problems import as_released as paper
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

OTHERS = Sizes(tasks=paper.TASKS, chunk=4, queries=5, test_queries=15, seconds=3600)


def sizes_of(setting: Setting) -> Sizes:
    """The sizes of a setting; those of data sets that are not embedded are the authors'."""
    width = paper.setting_of(setting.data).width
    return SETTINGS.get(setting, OTHERS._replace(width=width))


@dataclass(frozen=True)
class Recipe:
    """How a method is run."""

    rate: float = 3e-3  # of Adam, the outer optimiser
    inner: mm.InnerLoop | None = None  # in training; None: the method's own
    options: Mapping[str, Any] = field(default_factory=dict)  # others of the method
    cosine: bool = True  # whether the rate falls to zero along a cosine
    test: mm.InnerLoop | None = None  # at test; None: as in training
    statistics: Statistics = "transductive"  # of batch norm, in training
    released: paper.Setting | None = None  # whose network and fixed head to take; None: ours


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
    """As the paper's authors ran it on that data set, or on CIFAR-FS where they did not use it.

    Baselines recompute the features in each inner step; memory_reduced is tested as they did.

    Raises:
        ValueError: they did not run the method, or not on such tasks.
    """
    if method not in paper.METHODS or setting.curves:
        raise ValueError(
            f"preset: the authors ran {', '.join(paper.METHODS)} on classes, found {method} on "
            f"{setting.data}; use the preset 'tuned'."
        )
    known = paper.setting_of(setting.data)
    options = paper.options(known, method, cached=False)
    return Recipe(
        known.outer_rate,
        options.pop("inner"),
        statistics=options.pop("statistics"),
        options=options,
        cosine=False,
        test=paper.TEST_HEAD if method == "memory_reduced" else None,
        released=known,
    )


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
    if preset == "authors":
        return list(paper.METHODS)
    if preset == "same_inner":
        return ["anil", "itd_bio"]
    return [name for name in METHODS if not (setting.curves and name in regression.WITHOUT)]


def make_learner(
    setting: Setting,
    sizes: Sizes,
    dataset: Split,
    method: str,
    recipe: Recipe,
    statistics: Statistics | None = None,
) -> Learner:
    """The method on a network that fits the data; None: batch statistics as in training."""
    options = dict(recipe.options) | ({} if recipe.inner is None else {"inner": recipe.inner})
    if not isinstance(dataset, Dataset):
        widths = (sizes.width, sizes.width)
        return regression.learner(method, mlp(1, widths, dataset.example_shape), **options)
    options["statistics"] = statistics or recipe.statistics
    height, width, channels = dataset.example_shape
    shape = (height, width, channels)
    if recipe.released is None:
        # the head's scale is read only by methods that learn its start
        network = conv4(setting.ways, width=sizes.width, image_shape=shape, head_scale=1.0)
        return METHODS[method](network, **options)
    network = paper.network(recipe.released._replace(width=sizes.width), setting.ways, shape)
    if method in paper.FIXED_HEADS:
        options["start"] = paper.fixed_head(network, seed=0)  # one head, whatever the run's seed
    return METHODS[method](network, **options)
