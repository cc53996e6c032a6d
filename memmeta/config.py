"""What a run is: one dataclass, which the command line, the run folder and `train` share."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import optax

from memmeta import algorithms, models
from memmeta.algorithms import Learner
from memmeta.data import Dataset, Episodes
from memmeta.few_shot import Statistics
from memmeta.inner import InnerLoop, InnerSolver, accelerated


class UserError(Exception):
    """Something the user can mend: shown as one line, without a traceback."""


@dataclass(frozen=True)
class Config:
    """Options of a training run."""

    method: Literal["memory_reduced", "maml", "anil"] = "memory_reduced"
    """Which method of the literature to train."""
    data: str = "glyphs"
    """Data set: its train split is trained on, its test split is reported on."""
    data_dir: Path | None = None
    """Folder of data sets that are not embedded in the package."""
    ways: int = 5
    """Classes in a task."""
    shots: int = 1
    """Support examples of each class."""
    queries: int = 15
    """Query examples of each class."""
    cross_family: bool = False
    """Train on support and query images from different font families."""
    width: int = 32
    """Filters in each convolution block."""
    statistics: Statistics = "transductive"
    """Batch statistics: of support and query together, or of the support images alone."""
    inner_steps: int = 50
    """Steps of the inner loop in training."""
    test_steps: int | None = None
    """Steps of the inner loop in evaluation; None: as in training."""
    inner_rate: float | None = None
    """Rate of plain gradient descent in the inner loop; None: accelerated gradient descent at a
    rate from the curvature, which cannot diverge (maml: plain at 0.4)."""
    ridge: float = 0.1
    """Weight of the head's ridge; 0 is the algorithm as its authors released it (not for maml)."""
    cg_steps: int = 20
    """Conjugate-gradient steps of each task's linear system (memory_reduced only)."""
    tasks: int = 16
    """Tasks in a meta-step."""
    task_chunk: int | None = None
    """Tasks worked on at once, a divisor of TASKS; None: chosen for the platform."""
    meta_steps: int = 480
    """Meta-steps to make in all."""
    rate: float = 3e-3
    """Peak rate of Adam, the outer optimiser."""
    seed: int = 0
    """Everything random in the run follows from it."""
    log_every: int = 20
    """Meta-steps in one compiled call, and between two lines of metrics."""
    checkpoint_every: int = 120
    """Meta-steps between two checkpoints, a multiple of LOG_EVERY."""
    episodes: int = 600
    """Held-out test episodes of the final report."""

    def __post_init__(self) -> None:
        positive = ("ways", "shots", "queries", "width", "tasks", "log_every", "checkpoint_every")
        for name in positive:
            _require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        for name in ("inner_steps", "cg_steps", "meta_steps", "seed"):
            _require(name, getattr(self, name), getattr(self, name) >= 0, "0 or more")
        _require("episodes", self.episodes, self.episodes >= 2, "at least 2")
        _require("ridge", self.ridge, self.ridge >= 0, "0 or more")
        _require("rate", self.rate, self.rate > 0, "more than 0")
        if self.inner_rate is not None:
            _require("inner_rate", self.inner_rate, self.inner_rate > 0, "more than 0")
        if self.test_steps is not None:
            _require("test_steps", self.test_steps, self.test_steps >= 0, "0 or more")
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

    def episodes_of(self, *, cross_family: bool, queries: int | None = None) -> Episodes:
        """The sampler of this run's tasks."""
        return Episodes(self.ways, self.shots, queries or self.queries, cross_family=cross_family)

    def inner(self, steps: int) -> InnerLoop:
        """The inner loop this run asks for, with a number of steps."""
        solver: InnerSolver | optax.GradientTransformation = accelerated()
        if self.inner_rate is not None:
            solver = optax.sgd(self.inner_rate)
        elif self.method == "maml":
            solver = optax.sgd(0.4)
        return InnerLoop(solver, steps)

    def learner(self, dataset: Dataset) -> Learner:
        """The method this run asks for, on a network that fits the data."""
        head_scale = 0.0 if self.method == "memory_reduced" else 1.0
        network = models.conv4(
            self.ways,
            width=self.width,
            image_shape=tuple(dataset.inputs.shape[2:]),
            head_scale=head_scale,
        )
        inner, statistics = self.inner(self.inner_steps), self.statistics
        match self.method:
            case "memory_reduced":
                return algorithms.memory_reduced(
                    network,
                    inner=inner,
                    ridge=self.ridge,
                    cg_steps=self.cg_steps,
                    statistics=statistics,
                )
            case "anil":
                return algorithms.anil(
                    network, inner=inner, ridge=self.ridge, statistics=statistics
                )
            case "maml":
                return algorithms.maml(network, inner=inner, statistics=statistics)

    def optimizer(self) -> optax.GradientTransformation:
        """Adam, its rate falling to zero along a cosine over the run."""
        return optax.adam(optax.cosine_decay_schedule(self.rate, max(self.meta_steps, 1)))

    def to_json(self) -> str:
        """The configuration as text; `from_json` reads it."""
        return json.dumps(dataclasses.asdict(self), indent=2, default=str)

    @classmethod
    def from_json(cls, text: str, where: str) -> "Config":
        """Read what `to_json` wrote.

        Raises:
            UserError: it is no JSON object of this class's fields, or a value is out of range.
        """
        try:
            found = json.loads(text)
            if found.get("data_dir") is not None:
                found["data_dir"] = Path(found["data_dir"])
            return cls(**found)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{where}: not a configuration of a run ({error})") from error


def _require(name: str, found: Any, holds: bool, expected: str) -> None:
    if not holds:
        raise UserError(f"{name}: expected {expected}, found {found}")
