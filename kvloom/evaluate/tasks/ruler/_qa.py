"""Questions about documents of SQuAD or HotpotQA among others that do not help."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from random import Random
from typing import Any

from kvloom.errors import DataError
from kvloom.evaluate.metrics import match_part
from kvloom.evaluate.tasks.ruler._sub_task import Draft, SubTask

_QUESTION = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\n"
    "The following are given documents.\n\n{context}\n\nAnswer the question based on the given documents. Only give me "
    "the answer and do not output any other words.\n\nQuestion: {query}"
)
_OPENING = " Answer:"


@dataclass(frozen=True)
class Asked:
    """A question of a data set.

    Attributes:
        query: the question.
        answers: right answers.
        needed: documents that hold them.
        near: documents of the same article.
    """

    query: str
    answers: Sequence[str]
    needed: Sequence[str]
    near: Sequence[str] = ()


class Questions(SubTask):
    """The documents a question needs, then others of its article, then any, in an order of chance.

    Args:
        name: as published.
        asked: the data set's questions.
    """

    new_tokens = 32

    def __init__(self, name: str, asked: Sequence[Asked]) -> None:
        self.name = name
        self._asked = asked
        self._documents = sorted({document for each in asked for document in (*each.needed, *each.near)})

    def draft(self, random: Random, index: int, room: int, tokenizer: Any) -> Draft:
        """See `SubTask.draft`; a unit is a document, and where all are there they come again."""
        asked = self._asked[index % len(self._asked)]
        near = random.sample(asked.near, len(asked.near))
        others = [text for text in self._documents if text not in {*asked.needed, *near}]
        order = [*asked.needed, *near, *random.sample(others, len(others))]
        seed = random.random()

        def question(units: int) -> str:
            documents = list(islice(cycle(order), units))
            Random(seed).shuffle(documents)
            shown = [f"Document {place}:\n{text}" for place, text in enumerate(documents, start=1)]
            return _QUESTION.format(context="\n\n".join(shown), query=asked.query)

        return Draft(question, _OPENING, asked.answers, least=len(asked.needed))

    def score(self, answer: str, references: Sequence[str]) -> float:
        """See `SubTask.score`; any of the answers is right."""
        return match_part(answer, references)


def squad(document: Any) -> list[Asked]:
    """Questions with answers of SQuAD 2.0's published JSON (arXiv 1806.03822).

    Raises:
        DataError: a field is missing.
    """
    return _read("squad", document, _squad)


def hotpotqa(document: Any) -> list[Asked]:
    """Questions of HotpotQA's published JSON, distractor setting (arXiv 1809.09600).

    Raises:
        DataError: a field is missing.
    """
    return _read("hotpotqa", document, _hotpotqa)


def _read(name: str, document: Any, reader: Any) -> list[Asked]:
    try:
        asked = list(reader(document))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{name}.json is not in its published schema ({error!r}): give the file as it comes."
        ) from error
    if not asked:
        raise DataError(f"{name}.json holds no question that has an answer: give the file as it comes.")
    return asked


def _squad(document: Any) -> Iterator[Asked]:
    for article in document["data"]:
        contexts = [paragraph["context"] for paragraph in article["paragraphs"]]
        for paragraph in article["paragraphs"]:
            near = sorted(set(contexts) - {paragraph["context"]})
            for question in paragraph["qas"]:
                if not question.get("is_impossible", False):
                    answers = [answer["text"] for answer in question["answers"]]
                    yield Asked(question["question"], answers, [paragraph["context"]], near)


def _hotpotqa(document: Any) -> Iterator[Asked]:
    for row in document:
        needed = [f"{title}\n{''.join(sentences)}" for title, sentences in row["context"]]
        yield Asked(row["question"], [row["answer"]], needed)
