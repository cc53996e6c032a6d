"""The options of a run: one dataclass for the command line, the run folder and `train`."""

import dataclasses
import json
import typing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from memmeta import algorithms
from memmeta.data import (
    Augmentation,
    Dataset,
    Episodes,
    HostDataset,
    Limits,
    Reading,
    Warp,
    normalisation,
)
from memmeta.data._files import FileError, decode
from memmeta.data._reading import Progress, silent
from memmeta.few_shot._examples import squared_errors
from memmeta.few_shot._networks import Statistics
from memmeta.few_shot.algorithms import Learner
from memmeta.models import Network
from memmeta.problem import Params
from memmeta.runs import _methods as methods
from memmeta.runs import _networks as networks

if TYPE_CHECKING:
    Method: TypeAlias = str
else:
    Method = Literal[tuple(algorithms.METHODS)]  # the command line shows the choices


QUERIES, TEST_QUERIES = 5, 15  # of each class, where the data have so many
FAMILIES = {
    "glyphs": ("any styles", "different font families"),
    "emoji": ("any designs", "different designers"),
}
"""What episodes of any examples, and of support and query from different families, are called."""


class UserError(Exception):
    """An error that the user can correct; the command line shows it without a traceback."""


@dataclass(frozen=True)
class Config:
    """Options of a training run."""

    method: Method = "memory_reduced"
    """The method to train."""
    data: str = "glyphs"
    """Data set; training uses its train split, and the final report its test split. One of glyphs,
    emoji (in the package); omniglot, omniglot_alphabets, cifar_fs, fc100, tfds:NAME (downloaded);
    mini_imagenet, tiered_imagenet, folder, folder:SEED, npz (files in DATA_DIR)."""
    data_dir: Path | None = None
    """Folder of data sets that are not embedded in the package."""
    on_host: bool = False
    """Leave the data on the host, for data larger than the device's memory; the tasks are the same.
    Data from a folder or a download are memory-mapped."""
    image_size: int | None = None
    """Side in pixels of the square that images are resized to; None: 84 for files of a folder, and
    for others the size that they have."""
    channels: Literal[1, 3] | None = None
    """1 for grey images, 3 for colour; None: as the data are."""
    image_fit: Literal["crop", "squeeze"] = "crop"
    """How images become square: take the middle, or resize each side by its own factor."""
    background: str = "white"
    """Colour behind transparent image files: a name, or #rrggbb."""
    ways: int = 5
    """Classes in a task."""
    shots: int = 1
    """Support examples of each class."""
    queries: int | None = None
    """Query examples of each class in training; None: 5, or as many as the data have."""
    test_queries: int | None = None
    """Query examples of each class in evaluation; None: 15, or as many as the data have."""
    uneven: bool = False
    """Also use classes that have fewer examples than SHOTS and QUERIES ask for."""
    cross_family: bool | None = None
    """Train on support and query examples from different families, such as font families; None: if
    the training split has several families."""
    warp: float = 0.15
    """Largest random distortion of a training image: its rotation in radians, the logarithm of its
    two scales, and its shear; it is shifted by at most half this fraction of its side."""
    crop: int = 0
    """Width in pixels of a black border that is added to a training image before a crop of its
    original size is taken at random; 0: no crop."""
    flip: bool = False
    """Mirror each training image left to right with probability 1/2."""
    normalise: bool = False
    """Subtract the mean of the training split's pixels from every image, and divide by their
    standard deviation."""
    network: str = "conv4"
    """conv4, resnet12, mlp, or module:PATH.TO:FACTORY, a function of your own of (ways,
    image_shape) that returns a memmeta.models.Network."""
    width: int = 64
    """Filters in each convolution block of conv4; those of resnet12's blocks are 1, 2, 3 and 4
    times as many, and mlp has two layers of so many units. Not read by a network of your own."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What features are computed in; parameters and heads are float32."""
    loss: Literal["cross_entropy", "squared_error"] = "cross_entropy"
    """Loss of each example: squared_error is half the squared distance of the outputs from the
    class's unit vector."""
    round_down: bool = False
    """Drop the last row and column of feature maps with an odd side when pooling, as most papers
    do."""
    statistics: Statistics = "transductive"
    """What batch statistics are computed over: support and query together, the support images
    alone, or support and query separately."""
    head_start: Literal["zeros", "random"] = "zeros"
    """Initial value of every task's head, for methods that do not learn it; a random head is drawn
    from the seed, never trained, and kept in the checkpoints."""
    inner_steps: int | None = None
    """Steps of the inner loop in training; None: the method's own default."""
    test_steps: int | None = None
    """Steps of the inner loop in evaluation; None: as in training."""
    inner_rate: float | None = None
    """Use gradient descent with this rate in the inner loop; None: the method's own solver (for
    memory_reduced one that takes its rate from the curvature and cannot diverge)."""
    ridge: float | None = None
    """Weight of the head's ridge, for methods with one; 0 is memory_reduced as its authors released
    it; None: the method's own default."""
    proximal: float | None = None
    """Weight of the proximal term, for methods with one; None: the method's own default."""
    cg_steps: int | None = None
    """Conjugate-gradient steps of each task's linear system, for implicit methods; None: the
    method's own default."""
    terms: int | None = None
    """Terms of stocbio's Neumann series; None: 20."""
    directions: int | None = None
    """Random directions of pzobo in each task; None: 1."""
    first_rate: float | None = None
    """Rate that meta_sgd's learned inner rates start from; None: 0.4."""
    recompute_features: bool | None = None
    """Run the network anew in every inner step, as the code of some papers does, for methods that
    can (anil, itd_bio); None: no."""
    adapts: str | None = None
    """What adapts, for methods where this can be chosen: head, body, all, or a regular expression
    that is searched in the paths of parameters, such as body/Conv_0/kernel; None: all."""
    tasks: int = 8
    """Tasks in a meta-step."""
    task_chunk: int | None = None
    """Tasks processed at once, a divisor of TASKS; None: chosen for the platform."""
    meta_steps: int = 960
    """Total number of meta-steps."""
    rate: float = 3e-3
    """Initial learning rate of Adam, the outer optimiser."""
    seed: int = 0
    """Seed of everything random in training; the episodes of evaluation are the same for every
    seed."""
    log_every: int = 40
    """Meta-steps between two lines of metrics."""
    checkpoint_every: int | None = None
    """Meta-steps between two checkpoints, a multiple of LOG_EVERY; None: that next to 240."""
    episodes: int = 600
    """Number of held-out test episodes in the final report."""

    def __post_init__(self) -> None:
        _require_kinds(vars(self))
        sizes = (
            *("image_size", "channels", "ways", "shots", "queries", "test_queries"),
            *("width", "terms", "directions", "tasks"),
        )
        for name in (*sizes, "log_every"):
            value = getattr(self, name)
            _require(name, value, value is None or value >= 1, "at least 1")
            fits = value is None or name == "log_every" or value <= 2**16
            _require(name, value, fits, "at most 65536")
        for name in ("inner_steps", "test_steps", "cg_steps", "ridge", "proximal"):
            value = getattr(self, name)
            _require(name, value, value is None or value >= 0, "0 or more")
        for name in ("meta_steps", "seed", "warp", "crop"):
            _require(name, getattr(self, name), getattr(self, name) >= 0, "0 or more")
        _require("episodes", self.episodes, self.episodes >= 2, "at least 2")
        _require("rate", self.rate, self.rate > 0, "more than 0")
        for name in ("inner_rate", "first_rate"):
            value = getattr(self, name)
            _require(name, value, value is None or value > 0, "more than 0")
        every = self.saved_every
        multiple = every >= 1 and every % self.log_every == 0
        _require("checkpoint_every", every, multiple, f"a multiple of log_every={self.log_every}")
        if self.task_chunk is not None:
            fits = self.task_chunk >= 1 and self.tasks % self.task_chunk == 0
            _require("task_chunk", self.task_chunk, fits, f"a divisor of tasks={self.tasks}")

    @property
    def saved_every(self) -> int:
        """Meta-steps between two checkpoints: `checkpoint_every`, or what stands for None."""
        if self.checkpoint_every is not None:
            return self.checkpoint_every
        return max(round(240 / self.log_every), 1) * self.log_every

    def normalised(self, train: Dataset | HostDataset) -> Augmentation:
        """The normalisation of every image, in training and in evaluation.

        Args:
            train: the training split; all of it is read if `normalise` is set.

        Raises:
            DataError: `normalise` is set, and the data are not images.
        """
        if not self.normalise:
            return Augmentation()
        mean, deviation = normalisation(train)
        return Augmentation(mean=mean, deviation=deviation)

    def training_episodes(self, train: Dataset, normalised: Augmentation) -> Episodes:
        """The sampler of the training tasks.

        Args:
            train: the training split.
            normalised: the result of the method `normalised`.
        """
        warp = Warp(self.warp, self.warp, self.warp, self.warp / 2) if self.warp else None
        several = len(train.family_names) > 1
        cross_family = several if self.cross_family is None else self.cross_family
        augmentation = replace(normalised, warp=warp, crop_padding=self.crop, flip=self.flip)
        return Episodes(
            self.ways,
            self.shots,
            QUERIES if self.queries is None else self.queries,
            cross_family=cross_family,
            augmentation=augmentation,
            uneven=self.uneven,
        )

    def test_episodes(self, train: Dataset, normalised: Augmentation) -> dict[str, Episodes]:
        """The samplers of the tasks for evaluation, by their names in the report.

        The arguments are those of `training_episodes`.
        """
        queries = TEST_QUERIES if self.test_queries is None else self.test_queries
        usual = Episodes(
            self.ways, self.shots, queries, augmentation=normalised, uneven=self.uneven
        )
        if len(train.family_names) == 1:
            return {"held-out classes": usual}
        # a family has at most half of a class's examples, so that fewer queries are possible
        other_family = replace(usual, queries=min(queries, 5), cross_family=True)
        any_family, different = FAMILIES.get(train.name, ("any family", "different families"))
        return {any_family: usual, different: other_family}

    def reading(self, limits: Limits = Limits(), progress: Progress = silent) -> Reading:
        """How images are read.

        Args:
            limits: limits on what data files may contain.
            progress: shows how far a conversion or a check of the data is.
        """
        how = (self.image_size, self.image_fit, self.background)
        return Reading(*how, limits, progress, self.channels)

    def made_network(self, image_shape: tuple[int, ...]) -> Network:
        """The network that fits examples of a shape: height, width and channels."""
        height, width, channels = image_shape
        shape, rounded = (height, width, channels), not self.round_down
        options: Any = {"width": self.width, "round_up": rounded, "dtype": self.dtype}
        return networks.network(self.network, self.ways, shape, **options)

    def drawn_head(self, image_shape: tuple[int, ...]) -> Params | None:
        """A random head drawn from the seed, as NumPy arrays; None if heads start from zeros."""
        if self.head_start == "zeros":
            return None
        head = jax.jit(self.made_network(image_shape).init)(jax.random.key(self.seed))["head"]
        found: Params = jax.device_get(head)
        return found

    def learner(
        self, image_shape: tuple[int, ...], *, test: bool = False, head: Params | None = None
    ) -> Learner:
        """The method with the options of this run, and a network that fits the data.

        Args:
            image_shape: height, width and channels of the examples.
            test: whether the inner loop makes `test_steps` steps, if given, instead of
                `inner_steps`.
            head: where every task's head starts; None: `drawn_head`.

        Raises:
            UserError: an option was given that the method does not have, or the method cannot be
                used by the command line.
        """
        remedy = "; it needs a finite set of tasks: memmeta.meta.WarmStart in a loop of your own"
        expected = "a method that starts every task afresh, such as memory_reduced"
        _require("method", self.method, self.method != "amigo", expected + remedy)
        options = {name: getattr(self, name) for name in (*methods.LOOP, *methods.OWN, "adapts")}
        if test and self.test_steps is not None:
            options["inner_steps"] = self.test_steps
        given = {name: value for name, value in options.items() if value is not None}
        arguments: dict[str, Any] = {"statistics": self.statistics}
        if self.head_start == "random":
            given["head_start"] = self.head_start
            arguments["start"] = self.drawn_head(image_shape) if head is None else head
        if self.loss == "squared_error":
            arguments["loss"] = squared_error
        return methods.learner(self.method, self.made_network(image_shape), given, arguments)

    def optimizer(self) -> optax.GradientTransformation:
        """Adam with a learning rate that falls from `rate` to zero as a cosine over the run."""
        return optax.adam(optax.cosine_decay_schedule(self.rate, max(self.meta_steps, 1)))

    def plain(self) -> dict[str, Any]:
        """The options as a dict of values that JSON can represent."""
        options: dict[str, Any] = json.loads(self.to_json())
        return options

    def to_json(self) -> str:
        """The configuration as JSON, which `from_json` reads."""
        return json.dumps(dataclasses.asdict(self), indent=2, default=str)

    @classmethod
    def from_json(cls, content: str | bytes, where: str) -> "Config":
        """Read a configuration that `to_json` wrote.

        Args:
            content: the JSON.
            where: the name of the JSON in error messages.

        Raises:
            UserError: the content is not a JSON object with these fields, or a value is out of
                range.
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


def squared_error(outputs: Array, targets: Array) -> Array:
    """½ ‖output − unit vector of the class‖² of each example."""
    return squared_errors(outputs, targets, jnp.ones(outputs.shape[-1], bool))


def _require_kinds(values: dict[str, Any]) -> None:
    """Check that each value has the type of its field's annotation."""
    kinds = typing.get_type_hints(Config)
    for name, value in values.items():
        _require(name, value, _is(value, kinds[name]), _said(kinds[name]))


def _is(value: Any, kind: Any) -> bool:
    """Whether a value, which may come from an untrusted file, has an annotated type."""
    if typing.get_origin(kind) is typing.Literal:
        return any(value == each and type(value) is type(each) for each in typing.get_args(kind))
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
        return "one of " + ", ".join(map(str, typing.get_args(kind)))
    if kinds := typing.get_args(kind):
        return " or ".join(_said(each) for each in kinds)
    names = {int: "a whole number below 2³¹", float: "a finite number", type(None): "nothing"}
    return names.get(kind) or str(kind.__name__)


def _require(name: str, found: Any, holds: bool, expected: str) -> None:
    if not holds:
        raise UserError(f"{name}: expected {expected}, found {found}")
