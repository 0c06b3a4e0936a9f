"""LongBench (Bai et al. 2023, arXiv 2308.14508): its 16 English sets."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from kvloom._ledger import Record
from kvloom.assets import Row, Rows, longbench_rows
from kvloom.errors import DataError
from kvloom.evaluate._context import reads_at_most
from kvloom.evaluate._reply import Request
from kvloom.evaluate.tasks._answers import AnswerTask
from kvloom.evaluate.tasks._base import Bench, register
from kvloom.evaluate.tasks._case import Case
from kvloom.evaluate.tasks._chat import prompt_tokens
from kvloom.evaluate.tasks._longbench_sets import SETS
from kvloom.evaluate.tasks._settings import Settings

MARGIN = 596
"""By default prompts are cut to so many tokens less than the model reads (published: 3,500 of 4,096)."""

ROUGE_NOTE = (
    "ROUGE-L by the package rouge-score; LongBench's own script takes the package rouge, which splits at spaces only "
    "and joins the subsequences of sentences, so its published values are not comparable."
)
"""What the records of summaries say of their metric."""


class LongBench(AnswerTask):
    """One set; a prompt that is too long loses its middle, before it is put in the chat template.

    Args:
        name: of the set.
        settings: limit, lengths and data.
    """

    def __init__(self, name: str, settings: Settings) -> None:
        self.name = f"longbench/{name}"
        self._set = SETS[name]
        endless = name == "samsum"  # else the model goes on with dialogues of its own
        self.request = Request(self._set.new_tokens, ends=("\n",) if endless else (), at_least=int(endless))
        rows = longbench_rows(name, settings.data)
        self._rows = Rows(rows.rows[: settings.limit], rows.source)
        self._longest = settings.lengths[0] if settings.lengths else None

    def cases(self, bench: Bench) -> list[Case]:
        """See `AnswerTask.cases`.

        Raises:
            DataError: the model does not say how much it reads, and no length is given.
        """
        self._longest = self._longest or _context(bench.model) - MARGIN
        return [self._case(bench.tokenizer, row, self._longest) for row in self._rows.rows]

    def _case(self, tokenizer: Any, row: Row, longest: int) -> Case:
        text = self._set.prompt.format(context=row["context"], input=row["input"])
        prompt = prompt_tokens(tokenizer, [cut(tokenizer, text, longest)], chat=self._set.chat)
        return Case(str(row["_id"]), prompt, row["answers"], row["all_classes"] or ())

    def scores(self, case: Case, answer: str) -> Mapping[str, float]:
        """See `AnswerTask.scores`; the best reference counts."""
        if self._set.first_line:
            answer = answer.lstrip("\n").split("\n")[0]
        scores = (self._set.score(answer, each, case.classes) for each in case.references)
        return {self._set.metric: max(scores, default=0.0)}

    def facts(self) -> Record:
        """See `AnswerTask.facts`; the length is what prompts were cut to, and ROUGE says how it differs."""
        note = {"metric_note": ROUGE_NOTE} if self._set.metric == "rouge_l" else {}
        return {"length": self._longest, "data": self._rows.facts, **note}


def cut(tokenizer: Any, text: str, longest: int) -> str:
    """A text without its middle, so that its two halves together have `longest` tokens."""
    ids = tokenizer(text).input_ids
    if len(ids) <= longest:
        return text
    halves = ids[: longest // 2], ids[-(longest // 2) :]
    return "".join(tokenizer.decode(half, skip_special_tokens=True) for half in halves)


def _context(model: Any) -> int:
    reads = reads_at_most(model)
    if reads is None or reads <= MARGIN:
        raise DataError(
            f"The model reads {reads} tokens, too few to leave {MARGIN} of: say with --length what prompts have."
        )
    return reads


for _name in SETS:
    register(f"longbench/{_name}", partial(lambda name, settings: [LongBench(name, settings)], _name))
