"""What caches are scored on, found by name: one file a task."""

from __future__ import annotations

from kvloom.evaluate.tasks import _gsm8k, _longbench, _memory, _needle, _windows, ruler
from kvloom.evaluate.tasks._answers import AnswerTask
from kvloom.evaluate.tasks._base import Bench, Chosen, Task, choose, register, task_names
from kvloom.evaluate.tasks._case import Case
from kvloom.evaluate.tasks._settings import Settings

del _gsm8k, _longbench, _memory, _needle, _windows, ruler  # imported to register their tasks

__all__ = [
    "AnswerTask",
    "Bench",
    "Case",
    "Chosen",
    "Settings",
    "Task",
    "choose",
    "register",
    "task_names",
]
