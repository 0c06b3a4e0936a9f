"""RULER's sub-tasks as tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from random import Random
from typing import Any

from kvloom._ledger import Record
from kvloom.assets import json_file, texts
from kvloom.evaluate._reply import Request
from kvloom.evaluate.tasks._answers import AnswerTask
from kvloom.evaluate.tasks._base import Bench, register
from kvloom.evaluate.tasks._case import Case
from kvloom.evaluate.tasks._chat import prompt_tokens
from kvloom.evaluate.tasks._settings import Settings
from kvloom.evaluate.tasks.ruler._cwe import CommonWords
from kvloom.evaluate.tasks.ruler._fit import Fitter
from kvloom.evaluate.tasks.ruler._fwe import FrequentWords
from kvloom.evaluate.tasks.ruler._niah import NIAH, Niah, essay_words
from kvloom.evaluate.tasks.ruler._qa import Questions, hotpotqa, squad
from kvloom.evaluate.tasks.ruler._sub_task import Draft, SubTask
from kvloom.evaluate.tasks.ruler._vt import VariableTracking
from kvloom.evaluate.tasks.ruler._words import check_words

CASES = 500
"""Published number of questions of a sub-task."""

LENGTH = 4096


class Ruler(AnswerTask):
    """One sub-task at one length.

    Args:
        sub: the sub-task.
        length: tokens of a prompt and its answer; no prompt could be a unit of its text longer.
        count: questions.
        seed: of all that is drawn.
    """

    def __init__(self, sub: SubTask, length: int, count: int, seed: int) -> None:
        self.name = f"ruler/{sub.name}"
        self.request = Request(sub.new_tokens)
        self._sub = sub
        self.tokens = length
        self._count = count
        self._seed = seed

    def cases(self, bench: Bench) -> list[Case]:
        """See `AnswerTask.cases`."""
        return list(self.questions(bench.tokenizer))

    def questions(self, tokenizer: Any) -> Iterable[Case]:
        """All questions, each drawn from its own seed.

        Raises:
            DataError: the length has no room for a question.
        """
        fitter = Fitter(self.name, self.tokens - self._sub.new_tokens)
        for index in range(self._count):
            random = Random(f"{self.name} {self.tokens} {self._seed} {index}")
            draft = self._sub.draft(random, index, self.tokens, tokenizer)
            prompt = fitter.fill(partial(_prompt, tokenizer, draft), draft.least)
            yield Case(str(index), prompt, list(draft.references))

    def scores(self, case: Case, answer: str) -> Mapping[str, float]:
        """See `AnswerTask.scores`."""
        return {"match": self._sub.score(answer, case.references)}

    def facts(self) -> Record:
        """See `AnswerTask.facts`."""
        return {"length": self.tokens, "seed": self._seed}


def _prompt(tokenizer: Any, draft: Draft, units: int) -> list[int]:
    return prompt_tokens(tokenizer, [draft.question(units)], draft.opening)


def _make(sub_task: Callable[[Settings], SubTask], settings: Settings) -> list[Ruler]:
    sub = sub_task(settings)
    count = settings.limit or CASES
    return [Ruler(sub, length, count, settings.seed) for length in settings.lengths or (LENGTH,)]


def _niah(variant: Niah, settings: Settings) -> Niah:
    if variant.key == "words":
        check_words()
    if variant.haystack != "essay":
        return variant
    return variant.among(essay_words([text.content for text in texts(settings.texts)]))


def _cwe(_: Settings) -> CommonWords:
    check_words()
    return CommonWords()


for _variant in NIAH:
    register(f"ruler/{_variant.name}", partial(_make, partial(_niah, _variant)))
register("ruler/vt", partial(_make, lambda _: VariableTracking()))
register("ruler/cwe", partial(_make, _cwe))
register("ruler/fwe", partial(_make, lambda _: FrequentWords()))
register("ruler/qa_1", partial(_make, lambda it: Questions("qa_1", squad(json_file(it.data, "ruler/squad.json")))))
register(
    "ruler/qa_2", partial(_make, lambda it: Questions("qa_2", hotpotqa(json_file(it.data, "ruler/hotpotqa.json"))))
)
