"""The 16 English sets of LongBench: prompts, lengths and metrics as published (arXiv 2308.14508 and its repository)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvloom.evaluate.metrics import classification, edit_similarity, rouge_l, share_of_number, token_f1

Metric = Callable[[str, str, Sequence[str]], float]
"""`(answer, reference, classes)` -> a score from 0 to 1."""


@dataclass(frozen=True)
class LongBenchSet:
    """One set.

    Attributes:
        prompt: with places for a row's `context` and `input`.
        new_tokens: an answer has at most so many.
        metric: name of the metric.
        score: the metric.
        chat: put the prompt in the chat template; few-shot and code prompts are plain text.
        first_line: only the answer's first line counts.
    """

    prompt: str
    new_tokens: int
    metric: str
    score: Metric
    chat: bool = True
    first_line: bool = False


def _f1(answer: str, reference: str, _: Sequence[str]) -> float:
    return token_f1(answer, reference)


def _rouge(answer: str, reference: str, _: Sequence[str]) -> float:
    return rouge_l(answer, reference)


def _count(answer: str, reference: str, _: Sequence[str]) -> float:
    return share_of_number(answer, reference)


def _retrieval(answer: str, reference: str, _: Sequence[str]) -> float:
    """The reference is "Paragraph" and a number."""
    return share_of_number(answer, reference.removeprefix("Paragraph "))


def _edit(answer: str, reference: str, _: Sequence[str]) -> float:
    return edit_similarity(answer, reference)


_PASSAGES = (
    "Answer the question based on the given passages. Only give me the answer and do not output any other "
    "words.\n\nThe following are given passages.\n{context}\n\nAnswer the question based on the given passages. Only "
    "give me the answer and do not output any other words.\n\nQuestion: {input}\nAnswer:"
)

SETS: dict[str, LongBenchSet] = {
    "narrativeqa": LongBenchSet(
        "You are given a story, which can be either a novel or a movie script, and a question. Answer the question "
        "asconcisely as you can, using a single phrase if possible. Do not provide any explanation.\n\nStory: "
        "{context}\n\nNow, answer the question based on the story asconcisely as you can, using a single phrase if "
        "possible. Do not provide any explanation.\n\nQuestion: {input}\n\nAnswer:",
        128,
        "f1",
        _f1,
    ),
    "qasper": LongBenchSet(
        "You are given a scientific article and a question. Answer the question as concisely as you can, using a "
        "single phrase or sentence if possible. If the question cannot be answered based on the information in the "
        'article, write "unanswerable". If the question is a yes/no question, answer "yes", "no", or "unanswerable". '
        "Do not provide any explanation.\n\nArticle: {context}\n\n Answer the question based on the above article as "
        "concisely as you can, using a single phrase or sentence if possible. If the question cannot be answered "
        'based on the information in the article, write "unanswerable". If the question is a yes/no question, answer '
        '"yes", "no", or "unanswerable". Do not provide any explanation.\n\nQuestion: {input}\n\nAnswer:',
        128,
        "f1",
        _f1,
    ),
    "multifieldqa_en": LongBenchSet(
        "Read the following text and answer briefly.\n\n{context}\n\nNow, answer the following question based on the "
        "above text, only give me the answer and do not output any other words.\n\nQuestion: {input}\nAnswer:",
        64,
        "f1",
        _f1,
    ),
    "hotpotqa": LongBenchSet(_PASSAGES, 32, "f1", _f1),
    "2wikimqa": LongBenchSet(_PASSAGES, 32, "f1", _f1),
    "musique": LongBenchSet(_PASSAGES, 32, "f1", _f1),
    "gov_report": LongBenchSet(
        "You are given a report by a government agency. Write a one-page summary of the "
        "report.\n\nReport:\n{context}\n\nNow, write a one-page summary of the report.\n\nSummary:",
        512,
        "rouge_l",
        _rouge,
    ),
    "qmsum": LongBenchSet(
        "You are given a meeting transcript and a query containing a question or instruction. Answer the query in one "
        "or more sentences.\n\nTranscript:\n{context}\n\nNow, answer the query based on the above meeting transcript "
        "in one or more sentences.\n\nQuery: {input}\nAnswer:",
        512,
        "rouge_l",
        _rouge,
    ),
    "multi_news": LongBenchSet(
        "You are given several news passages. Write a one-page summary of all news. \n\nNews:\n{context}\n\nNow, "
        "write a one-page summary of all the news.\n\nSummary:",
        512,
        "rouge_l",
        _rouge,
    ),
    "trec": LongBenchSet(
        "Please determine the type of the question below. Here are some examples of questions.\n\n{context}\n{input}",
        64,
        "classification",
        classification,
        chat=False,
        first_line=True,
    ),
    "triviaqa": LongBenchSet(
        "Answer the question based on the given passage. Only give me the answer and do not output any other words. "
        "The following are some examples.\n\n{context}\n\n{input}",
        32,
        "f1",
        _f1,
        chat=False,
        first_line=True,
    ),
    "samsum": LongBenchSet(
        "Summarize the dialogue into a few short sentences. The following are some examples.\n\n{context}\n\n{input}",
        128,
        "rouge_l",
        _rouge,
        chat=False,
        first_line=True,
    ),
    "passage_count": LongBenchSet(
        "There are some paragraphs below sourced from Wikipedia. Some of them may be duplicates. Please carefully "
        "read these paragraphs and determine how many unique paragraphs there are after removing duplicates. In other "
        "words, how many non-repeating paragraphs are there in total?\n\n{context}\n\nPlease enter the final count of "
        "unique paragraphs after removing duplicates. The output format should only contain the number, such as 1, 2, "
        "3, and so on.\n\nThe final answer is: ",
        32,
        "count",
        _count,
    ),
    "passage_retrieval_en": LongBenchSet(
        "Here are 30 paragraphs from Wikipedia, along with an abstract. Please determine which paragraph the abstract "
        "is from.\n\n{context}\n\nThe following is an abstract.\n\n{input}\n\nPlease enter the number of the "
        'paragraph that the abstract is from. The answer format must be like "Paragraph 1", "Paragraph 2", '
        "etc.\n\nThe answer is: ",
        32,
        "retrieval",
        _retrieval,
    ),
    "lcc": LongBenchSet(
        "Please complete the code given below. \n{context}Next line of code:\n",
        64,
        "edit_similarity",
        _edit,
        chat=False,
    ),
    "repobench-p": LongBenchSet(
        "Please complete the code given below. \n{context}{input}Next line of code:\n",
        64,
        "edit_similarity",
        _edit,
        chat=False,
    ),
}
