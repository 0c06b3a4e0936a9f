"""Tasks whose cases are answered greedily through each contestant's cache."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

from kvloom._ledger import Record, fingerprint
from kvloom.errors import DataError
from kvloom.evaluate._asking import ask
from kvloom.evaluate._contestants import Contestant, check_names
from kvloom.evaluate._context import check_model, reads_at_most, surroundings
from kvloom.evaluate._live import fullest
from kvloom.evaluate._mean_score import mean_score
from kvloom.evaluate._records import open_pieces, write_results
from kvloom.evaluate._reply import Request
from kvloom.evaluate.tasks._base import Bench, Task
from kvloom.evaluate.tasks._case import Case


class AnswerTask(Task):
    """A task whose cases are answered, those of one length as many together as the bench says.

    Attributes:
        request: how cases are answered.
    """

    request: Request

    @abstractmethod
    def cases(self, bench: Bench) -> Sequence[Case]:
        """All cases, the same ones every time."""

    @abstractmethod
    def scores(self, case: Case, answer: str) -> Mapping[str, float]:
        """What an answer scores, from 0 to 1, by metric; the first one is the task's own."""

    @abstractmethod
    def facts(self) -> Record:
        """What else the records say: where the data comes from, lengths."""

    def run(self, bench: Bench) -> list[Record]:
        """One `task` record for each contestant.

        `score` is the mean of the task's own metric and `scores` has every metric's, each with its interval; `cases`
        has every answer; bytes and true bits are those of the fullest cache.

        Raises:
            DataError: prompts do not fit the model, or a contestant.
            ModelError: the model is in training mode.
        """
        check_names(bench.contestants)
        check_model(bench.model)
        cases = self.cases(bench)
        self._check_room(bench, cases)
        answers = self._answers(bench, cases)
        where = surroundings(bench.model, bench.name)
        records = [
            self._record(contestant, cases, answered, where)
            for contestant, answered in zip(bench.contestants, answers, strict=True)
        ]
        write_results(bench.out, records, bench.model)
        return records

    def _check_room(self, bench: Bench, cases: Sequence[Case]) -> None:
        longest = max(len(case.prompt) for case in cases) + self.request.new_tokens
        reads = reads_at_most(bench.model)
        if reads and longest > reads:
            raise DataError(
                f"{self.name} takes {longest} tokens of prompt and answer, and the model reads {reads}: give a smaller "
                "length, or fewer shots."
            )

    def _answers(self, bench: Bench, cases: Sequence[Case]) -> list[list[Record]]:
        """Of every contestant the pieces of all cases."""

        def tell(place: int, contestant: Contestant, done: int, total: int) -> None:
            bench.progress(f"{self.name}, case {cases[place].name}, {contestant.name}", done, total)

        answers = ask(
            bench.model,
            bench.tokenizer,
            [case.prompt for case in cases],
            bench.contestants,
            self.request,
            open_pieces(bench.out, bench.model),
            tell,
            bench.batch,
        )
        total = len(cases) * len(bench.contestants)
        bench.progress(f"{self.name} answered", total, total)
        return answers

    def _record(
        self, contestant: Contestant, cases: Sequence[Case], answers: Sequence[Record], where: Record
    ) -> Record:
        scored = [dict(self.scores(case, piece["answer"])) for case, piece in zip(cases, answers, strict=True)]
        scores = {metric: mean_score([each[metric] for each in scored]) for metric in scored[0]}
        about = {"task": self.name, **self.facts(), "total": len(cases), **self.request.fields}
        asked = fingerprint([list(case.prompt) for case in cases])
        return {
            "kind": "task",
            "id": fingerprint(
                [contestant.identity, about, asked, *(where[key] for key in ("model", "device", "dtype"))]
            ),
            **contestant.labels,
            **about,
            "metric": next(iter(scores)),
            "score": next(iter(scores.values())),
            "scores": scores,
            **fullest(answers),
            "cases": [
                {"name": case.name, "tokens": len(case.prompt), "answer": piece["answer"], "scores": each}
                for case, piece, each in zip(cases, answers, scored, strict=True)
            ],
            **where,
        }
