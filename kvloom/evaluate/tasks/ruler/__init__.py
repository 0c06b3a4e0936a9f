"""RULER (Hsieh et al. 2024, arXiv 2404.06654): 13 sub-tasks made from their definitions at any length."""

from __future__ import annotations

from kvloom.evaluate.tasks.ruler._task import Ruler

__all__ = ["Ruler"]
