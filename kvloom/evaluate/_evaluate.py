"""The one door to all evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvloom._ledger import Record
from kvloom.evaluate._contestants import Contestant
from kvloom.evaluate._context import Progress, silent
from kvloom.evaluate.tasks import Bench, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def evaluate(
    model: PreTrainedModel,
    tokenizer: Any,
    tasks: Sequence[Task],
    contestants: Sequence[Contestant],
    *,
    name: str | None = None,
    out: Path | None = None,
    batch: int = 1,
    progress: Progress = silent,
) -> list[Record]:
    """Run tasks, one after the other.

    Args:
        model: a causal language model in evaluation mode.
        tokenizer: the model's.
        tasks: from `choose`.
        contestants: whose caches.
        name: of the model in the records; by default the last part of its path.
        out: results file; its records of the same work are replaced, and finished pieces are kept beside it, in
            `<out>.pieces`, so that a run that was killed goes on where it stopped and ends with the records it would
            have had.
        batch: prompts of one length that are answered in one forward pass. With 1 an answer depends on nothing else;
            with more, sums are rounded otherwise. Windows of text are read one at a time.
        progress: told before every piece of work.

    Returns:
        A record for each task and contestant.

    Raises:
        DataError: a task does not fit the model.
        ModelError: the model is in training mode.
    """
    bench = Bench(model, tokenizer, contestants, name, out, progress, batch)
    return [record for task in tasks for record in task.run(bench)]
