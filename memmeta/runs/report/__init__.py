"""Runs as one HTML page and PNGs: learning curves, accuracy by group, an episode, health, cost."""

from memmeta.runs.report._judge import judge_all
from memmeta.runs.report._page import write

__all__ = ["judge_all", "write"]
