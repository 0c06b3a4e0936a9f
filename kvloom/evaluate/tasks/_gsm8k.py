"""GSM8K: grade school mathematics (Cobbe et al. 2021, arXiv 2110.14168), with and without turns."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from kvloom._ledger import Record
from kvloom.assets import Rows, gsm8k_rows
from kvloom.errors import DataError
from kvloom.evaluate._reply import Request
from kvloom.evaluate.metrics import exact_match, last_number, stated_number
from kvloom.evaluate.tasks._answers import AnswerTask
from kvloom.evaluate.tasks._base import Bench, register
from kvloom.evaluate.tasks._case import Case
from kvloom.evaluate.tasks._chat import prompt_tokens
from kvloom.evaluate.tasks._settings import Settings
from kvloom.evaluate.tasks._shots import CHAIN_OF_THOUGHT

NEW_TOKENS = 256


class Gsm8k(AnswerTask):
    """Questions after worked examples; an answer is right if its number is the reference's, as it is written.

    `flexible` takes the last number of an answer, `strict` the one that is stated as in the examples.

    Args:
        settings: limit, shots and data.
    """

    shots: int
    statement: str

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.shots = settings.shots or self.shots
        rows = gsm8k_rows("test", settings.data)
        self._rows = Rows(rows.rows[: settings.limit], rows.source)

    def cases(self, bench: Bench) -> list[Case]:
        """See `AnswerTask.cases`."""
        return [
            Case(str(place), self.prompt(bench.tokenizer, row["question"]), [row["answer"]])
            for place, row in enumerate(self._rows.rows)
        ]

    @abstractmethod
    def prompt(self, tokenizer: Any, question: str) -> Sequence[int]:
        """Token ids of the examples and a question."""

    def scores(self, case: Case, answer: str) -> Mapping[str, float]:
        """See `AnswerTask.scores`."""
        (reference,) = case.references
        number = reference.rpartition("#### ")[2]
        found = {"flexible": last_number(answer), "strict": stated_number(answer, self.statement)}
        return {metric: exact_match(each, number) for metric, each in found.items()}

    def facts(self) -> Record:
        """See `AnswerTask.facts`."""
        return {"shots": self.shots, "data": self._rows.facts}


class FewShot(Gsm8k):
    """Eight questions with chains of thought before each question, as plain text (arXiv 2201.11903)."""

    name = "gsm8k"
    shots = len(CHAIN_OF_THOUGHT)
    statement = r"The answer is (-?[0-9.,]+)."
    request = Request(NEW_TOKENS, stop=("Q:",))

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        if self.shots > len(CHAIN_OF_THOUGHT):
            raise DataError(
                f"gsm8k has {len(CHAIN_OF_THOUGHT)} published examples, and shots is {self.shots}: ask for fewer, or "
                "for gsm8k_multiturn."
            )

    def prompt(self, tokenizer: Any, question: str) -> Sequence[int]:
        """See `Gsm8k.prompt`."""
        shown = [f"Q: {asked}\nA: {said}\n\n" for asked, said in CHAIN_OF_THOUGHT[: self.shots]]
        return prompt_tokens(tokenizer, ["".join(shown) + f"Q: {question}\nA:"], chat=False)


class MultiTurn(Gsm8k):
    """Many rows of the training set as turns of a chat before each question (KVTuner, arXiv 2502.04420)."""

    name = "gsm8k_multiturn"
    shots = 16
    statement = r"#### (-?[0-9.,]+)"
    request = Request(NEW_TOKENS, stop=("Question:",))

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        train = gsm8k_rows("train", settings.data).rows
        if len(train) < self.shots:
            raise DataError(
                f"gsm8k_multiturn shows {self.shots} training rows, and there are {len(train)}: ask for fewer."
            )
        self._shown = train[: self.shots]

    def prompt(self, tokenizer: Any, question: str) -> Sequence[int]:
        """See `Gsm8k.prompt`."""
        shown = [said for row in self._shown for said in (_asked(row["question"]), row["answer"])]
        return prompt_tokens(tokenizer, [*shown, _asked(question)])


def _asked(question: str) -> str:
    return f"Question: {question}\nAnswer:"


register(FewShot.name, lambda settings: [FewShot(settings)])
register(MultiTurn.name, lambda settings: [MultiTurn(settings)])
