"""What a run is: one dataclass, which the command line, the run folder and `train` share."""

import dataclasses
import inspect
import json
import typing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import jax
import optax

from memmeta import algorithms, models
from memmeta.data import Augmentation, Dataset, Episodes, HostDataset, Warp, normalisation
from memmeta.data._files import FileError, decode
from memmeta.few_shot._networks import Statistics
from memmeta.few_shot.algorithms import Learner
from memmeta.inner import InnerLoop

if TYPE_CHECKING:
    Method: TypeAlias = str
else:
    Method = Literal[tuple(algorithms.METHODS)]  # the command line shows the choices


class UserError(Exception):
    """Something the user can mend: shown as one line, without a traceback."""


@dataclass(frozen=True)
class Config:
    """Options of a training run."""

    method: Method = "memory_reduced"
    """Which method of the literature to train."""
    data: str = "glyphs"
    """Data set: its train split is trained on, its test split is reported on."""
    data_dir: Path | None = None
    """Folder of data sets that are not embedded in the package."""
    on_host: bool = False
    """Leave the data on the host, memory-mapped where they come from a folder or a download, for
    those larger than the device's memory; the tasks are the same."""
    image_size: int = 84
    """Pixels a side that image files of a folder are resized to."""
    image_fit: Literal["crop", "squeeze"] = "crop"
    """How: by the short side, then the middle; or both sides, each by its own factor."""
    background: str = "white"
    """What shows through where an image file is transparent: a colour's name, or #rrggbb."""
    ways: int = 5
    """Classes in a task."""
    shots: int = 1
    """Support examples of each class."""
    queries: int = 5
    """Query examples of each class in training."""
    test_queries: int = 15
    """Query examples of each class in evaluation."""
    uneven: bool = False
    """Take classes that have too few examples for SHOTS and QUERIES too, with those they have."""
    cross_family: bool | None = None
    """Train on support and query examples from different families, such as font families; None:
    where the training split has several."""
    warp: float = 0.15
    """Turn, stretch and shear every image of training at random, by at most this angle in radians,
    logarithm of the scale and slope, and shift it by at most half this share of its side."""
    crop: int = 0
    """Crop every image of training at random, after this many black pixels were added around it."""
    flip: bool = False
    """Mirror every other image of training."""
    normalise: bool = False
    """Take from every image the mean of the training split's pixels, divide by their deviation."""
    width: int = 64
    """Filters in each convolution block."""
    round_down: bool = False
    """Leave the last row of an odd number out of pooling, and column, as most papers do."""
    statistics: Statistics = "transductive"
    """Batch statistics: of support and query together, of the support images alone, or of support
    and query apart."""
    head_start: Literal["zeros", "random"] = "zeros"
    """Where every task's head starts, for methods that do not learn it; a random head is drawn from
    the seed and never trained."""
    inner_steps: int | None = None
    """Steps of the inner loop in training; None: the method's own default."""
    test_steps: int | None = None
    """Steps of the inner loop in evaluation; None: as in training."""
    inner_rate: float | None = None
    """Rate of plain gradient descent in the inner loop; None: the method's own solver (for
    memory_reduced one that takes its rate from the curvature and cannot diverge)."""
    ridge: float | None = None
    """Weight of the head's ridge, for methods with one; 0 is memory_reduced as its authors released
    it; None: the method's own default."""
    proximal: float | None = None
    """Weight of the proximal term, for methods with one; None: the method's own default."""
    cg_steps: int | None = None
    """Conjugate-gradient steps of each task's linear system, for implicit methods; None: the
    method's own default."""
    tasks: int = 8
    """Tasks in a meta-step."""
    task_chunk: int | None = None
    """Tasks worked on at once, a divisor of TASKS; None: chosen for the platform."""
    meta_steps: int = 960
    """Meta-steps to make in all."""
    rate: float = 3e-3
    """Peak rate of Adam, the outer optimiser."""
    seed: int = 0
    """Everything random in the run follows from it."""
    log_every: int = 40
    """Meta-steps in one compiled call, and between two lines of metrics."""
    checkpoint_every: int = 240
    """Meta-steps between two checkpoints, a multiple of LOG_EVERY."""
    episodes: int = 600
    """Held-out test episodes of the final report."""

    def __post_init__(self) -> None:
        _require_kinds(vars(self))
        sizes = ("image_size", "ways", "shots", "queries", "test_queries", "width", "tasks")
        for name in (*sizes, "log_every", "checkpoint_every"):
            _require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        for name in sizes:
            _require(name, getattr(self, name), getattr(self, name) <= 2**16, "at most 65536")
        for name in ("inner_steps", "test_steps", "cg_steps", "ridge", "proximal"):
            value = getattr(self, name)
            _require(name, value, value is None or value >= 0, "0 or more")
        for name in ("meta_steps", "seed", "warp", "crop"):
            _require(name, getattr(self, name), getattr(self, name) >= 0, "0 or more")
        _require("episodes", self.episodes, self.episodes >= 2, "at least 2")
        _require("rate", self.rate, self.rate > 0, "more than 0")
        if self.inner_rate is not None:
            _require("inner_rate", self.inner_rate, self.inner_rate > 0, "more than 0")
        multiple = self.checkpoint_every % self.log_every == 0
        _require(
            "checkpoint_every",
            self.checkpoint_every,
            multiple,
            f"a multiple of log_every={self.log_every}",
        )
        if self.task_chunk is not None:
            fits = self.task_chunk >= 1 and self.tasks % self.task_chunk == 0
            _require("task_chunk", self.task_chunk, fits, f"a divisor of tasks={self.tasks}")

    def normalised(self, train: Dataset | HostDataset) -> Augmentation:
        """What is done to every image, of training and of evaluation.

        Args:
            train: the training split, all of which is read where its statistics are asked for.

        Raises:
            DataError: images are to be normalised, and the data are none.
        """
        if not self.normalise:
            return Augmentation()
        mean, deviation = normalisation(train)
        return Augmentation(mean=mean, deviation=deviation)

    def training_episodes(self, train: Dataset, normalised: Augmentation) -> Episodes:
        """The sampler of the tasks that are trained on.

        Args:
            train: the training split.
            normalised: from the method of that name.
        """
        warp = Warp(self.warp, self.warp, self.warp, self.warp / 2) if self.warp else None
        several = len(train.family_names) > 1
        cross_family = several if self.cross_family is None else self.cross_family
        augmentation = replace(normalised, warp=warp, crop_padding=self.crop, flip=self.flip)
        return Episodes(
            self.ways,
            self.shots,
            self.queries,
            cross_family=cross_family,
            augmentation=augmentation,
            uneven=self.uneven,
        )

    def test_episodes(self, train: Dataset, normalised: Augmentation) -> dict[str, Episodes]:
        """The samplers of the tasks that are judged, by what they are called.

        Arguments as for `training_episodes`.
        """
        any_style = Episodes(
            self.ways,
            self.shots,
            self.test_queries,
            augmentation=normalised,
            uneven=self.uneven,
        )
        if len(train.family_names) == 1:
            return {"any styles": any_style}
        # half of the styles or less are of one family, so fewer queries than with any styles
        queries = min(self.test_queries, 5)
        other_family = replace(any_style, queries=queries, cross_family=True)
        return {"any styles": any_style, "different font families": other_family}

    def learner(self, image_shape: tuple[int, ...], *, test: bool = False) -> Learner:
        """The method this run asks for, on a network that fits the data.

        Args:
            image_shape: height, width and channels of the examples.
            test: whether the inner loop makes the steps of evaluation.

        Raises:
            UserError: an option was given that the method does not have.
        """
        method = algorithms.METHODS[self.method]
        remedy = "; it needs a finite set of tasks: memmeta.meta.WarmStart in a loop of your own"
        expected = "a method that starts every task afresh, such as memory_reduced"
        _require("method", self.method, self.method != "amigo", expected + remedy)
        height, width, channels = image_shape
        network = models.conv4(
            self.ways,
            width=self.width,
            image_shape=(height, width, channels),
            round_up=not self.round_down,
            head_scale=1.0,  # read only by methods that learn the head's start, and by head_start
        )
        known = inspect.signature(method).parameters
        options = {name: getattr(self, name) for name in ("ridge", "cg_steps", "proximal")}
        given = {name: value for name, value in options.items() if value is not None}
        for name in given:
            _require(
                name, given[name], name in known, f"no value: {self.method} has no such option"
            )
        if self.head_start == "random":
            _require("head_start", "random", "start" in known, f"zeros: {self.method} has no start")
            given["start"] = jax.jit(network.init)(jax.random.key(self.seed))["head"]
        if "inner" in known:
            steps = self.test_steps if test and self.test_steps is not None else self.inner_steps
            given["inner"] = self._inner(known["inner"].default, steps)
        learner: Learner = method(network, statistics=self.statistics, **given)
        return learner

    def _inner(self, default: InnerLoop, steps: int | None) -> InnerLoop:
        solver = default.solver if self.inner_rate is None else optax.sgd(self.inner_rate)
        return InnerLoop(solver, default.steps if steps is None else steps)

    def optimizer(self) -> optax.GradientTransformation:
        """Adam, its rate falling to zero along a cosine over the run."""
        return optax.adam(optax.cosine_decay_schedule(self.rate, max(self.meta_steps, 1)))

    def plain(self) -> dict[str, Any]:
        """The options as JSON knows them."""
        options: dict[str, Any] = json.loads(self.to_json())
        return options

    def to_json(self) -> str:
        """The configuration as text; `from_json` reads it."""
        return json.dumps(dataclasses.asdict(self), indent=2, default=str)

    @classmethod
    def from_json(cls, content: str | bytes, where: str) -> "Config":
        """Read what `to_json` wrote.

        Raises:
            UserError: it is no JSON object of this class's fields, or a value is out of range.
        """
        content = content.encode("utf-8", "replace") if isinstance(content, str) else content
        try:
            found = decode(content, dict[str, Any], where)
        except FileError as error:
            raise UserError(f"{error}; expected the configuration of a run") from error
        unknown = sorted(set(found) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise UserError(f"{where}: not a configuration of a run (unknown: {unknown[0]!r})")
        if isinstance(found.get("data_dir"), str):
            found["data_dir"] = Path(found["data_dir"])
        try:
            _require_kinds(found)
            return cls(**found)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error


def _require_kinds(values: dict[str, Any]) -> None:
    """Each value is of its field's annotation."""
    kinds = typing.get_type_hints(Config)
    for name, value in values.items():
        _require(name, value, _is(value, kinds[name]), _said(kinds[name]))


def _is(value: Any, kind: Any) -> bool:
    """Whether a value, maybe from a file of a stranger's, is of an annotation's kind."""
    if typing.get_origin(kind) is typing.Literal:
        return value in typing.get_args(kind)
    if typing.get_origin(kind) is not None:
        return any(_is(value, each) for each in typing.get_args(kind))
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**31
    if kind is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and abs(value) < 1e300
    return isinstance(value, kind)


def _said(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return "one of " + ", ".join(typing.get_args(kind))
    if kinds := typing.get_args(kind):
        return " or ".join(_said(each) for each in kinds)
    names = {int: "a whole number below 2³¹", float: "a finite number", type(None): "nothing"}
    return names.get(kind) or str(kind.__name__)


def _require(name: str, found: Any, holds: bool, expected: str) -> None:
    if not holds:
        raise UserError(f"{name}: expected {expected}, found {found}")
