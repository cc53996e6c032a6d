"""An HTML page and PNGs about runs: learning, accuracy by group, an episode, health, and cost."""

from memmeta._shared.readable import readable
from memmeta.runs.report._judge import judge_all
from memmeta.runs.report._page import write

__all__ = ["judge_all", "write"]

readable(__name__)
