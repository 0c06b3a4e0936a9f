"""lm-eval's tasks through packed caches: a model class of lm-eval, and what runs it.

Importing this module makes the model known to lm-eval as `kvloom`; releases after 0.4.13 find it by its entry point.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvloom import Plan, load_model
from kvloom._extras import require
from kvloom._names import unknown
from kvloom.errors import DataError
from kvloom.evaluate import (
    Contestant,
    Progress,
    Reader,
    Record,
    Request,
    dense_contestant,
    fingerprint,
    mean_score,
    plan_contestant,
    reads_at_most,
    silent,
    surroundings,
    write_records,
)

require("lm-eval", "kvloom.integrations.lm_eval")

from lm_eval import simple_evaluate  # noqa: E402
from lm_eval.api.model import TemplateLM  # noqa: E402
from lm_eval.api.registry import register_model  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # noqa: E402

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from transformers import PreTrainedModel

NEW_TOKENS = 256
"""Tokens of an answer where a task does not say, as lm-eval has it."""

_LENGTH = 2048
"""Tokens of a sequence where a model does not say, as lm-eval has it."""

_Z = 1.959963984540054


@register_model("kvloom")
class KvloomLM(TemplateLM):  # type: ignore[misc]
    """A causal language model whose every request goes through a contestant's cache, one sequence at a time.

    Context and continuation of a loglikelihood request are fed in chunks, and every scored token is predicted from what
    the cache holds of all tokens before it; requests of one context that follow each other fill it once. Answers are
    decoded greedily. What is longer than `max_length` loses its start.

    Args:
        model: a loaded model, or what `kvloom.load_model` takes.
        plan: what the cache stores, or its file; None is the uncompressed cache.
        tokenizer: of a loaded model.
        prefill: in place of the plan's own.
        contestant: any cache, in place of a plan's.
        chunk: tokens of one forward pass in scoring.
        max_length: tokens of a sequence; by default what the model reads.
        device: as `kvloom.load_model` takes it.
        dtype: as `kvloom.load_model` takes it.
        batch_size: lm-eval passes it; must be 1.
        max_batch_size: lm-eval passes it; not used, as batches are of 1.
        out: results file, beside which finished requests are kept.
        progress: told before every request.

    Raises:
        DataError: `batch_size` is not 1.
    """

    def __init__(
        self,
        model: PreTrainedModel | str,
        plan: Plan | str | None = None,
        *,
        tokenizer: Any = None,
        prefill: Any = "quantized",
        contestant: Contestant | None = None,
        chunk: int = 128,
        max_length: int | None = None,
        device: str | None = None,
        dtype: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        out: Path | None = None,
        progress: Progress = silent,
    ) -> None:
        super().__init__()
        if str(batch_size) != "1":
            raise DataError(f"batch_size is {batch_size}: kvloom scores one sequence at a time, so give 1.")
        if isinstance(model, str):
            model, tokenizer = load_model(model, device=device, dtype=dtype)
        self.tokenizer = tokenizer
        self.max_length = max_length or reads_at_most(model) or _LENGTH
        self._reader = Reader(
            model, tokenizer, contestant or _contestant(model, plan, prefill), chunk=chunk, out=out and Path(out)
        )
        self._progress = progress

    @property
    def held(self) -> Record:
        """Tokens, bytes and true bits of the fullest cache so far."""
        return self._reader.held

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is: the beginning-of-sequence token, or the end-of-text token without one."""
        start = self.tokenizer.bos_token_id
        return self.eot_token_id if start is None else int(start)

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's name, which lm-eval's caches of requests have in theirs."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        """Token ids; without a second beginning-of-sequence token where the text has one."""
        start = self.tokenizer.bos_token
        given = bool(start) and string.startswith(start)
        special = not given if add_special_tokens is None else add_special_tokens
        ids: list[int] = self.tokenizer(string, add_special_tokens=special).input_ids
        return ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Turns of a chat as one text."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """See lm-eval's `LM.loglikelihood`."""
        scored: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return scored

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **options: Any
    ) -> list[tuple[float, bool]]:
        return [
            self._scored(place, len(requests), context, continuation)
            for place, (_, context, continuation) in enumerate(requests)
        ]

    def _scored(self, place: int, total: int, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        self._progress("scoring continuations", place, total)
        kept = max(1, self.max_length + 1 - len(continuation))
        return self._reader.loglikelihood(context[-kept:], continuation[-self.max_length :])

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """See lm-eval's `LM.loglikelihood_rolling`."""
        return [
            sum(self._scored(place, len(requests), *window)[0] for window in self._windows(request.args[0]))
            for place, request in enumerate(requests)
        ]

    def _windows(self, text: str) -> list[tuple[list[int], list[int]]]:
        """Contexts and continuations that cover a text."""
        windows = get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        return [make_disjoint_window(window) for window in windows]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """See lm-eval's `LM.generate_until`.

        Raises:
            DataError: a task asks for random answers, or for longer ones than the model reads.
        """
        return [self._answer(place, len(requests), *request.args) for place, request in enumerate(requests)]

    def _answer(self, place: int, total: int, context: str, options: Mapping[str, Any]) -> str:
        self._progress("answering", place, total)
        if options.get("do_sample") or options.get("temperature"):
            raise DataError(
                "The task asks for random answers, and kvloom gives the most probable: set do_sample false."
            )
        new_tokens = int(options.get("max_gen_toks", NEW_TOKENS))
        room = self.max_length - new_tokens
        if room < 1:
            raise DataError(f"max_gen_toks is {new_tokens}, and the model reads {self.max_length}: ask for fewer.")
        until = options.get("until") or ()
        stop = (until,) if isinstance(until, str) else tuple(until)
        return self._reader.answer(self.tok_encode(context)[-room:], Request(new_tokens, stop))


def harness(
    model: PreTrainedModel,
    tokenizer: Any,
    tasks: Sequence[str],
    contestants: Sequence[Contestant],
    *,
    limit: int | None = None,
    shots: int | None = None,
    include: Path | None = None,
    chat: bool = False,
    name: str | None = None,
    out: Path | None = None,
    progress: Progress = silent,
) -> list[Record]:
    """Run lm-eval's tasks.

    Args:
        model: a causal language model in evaluation mode.
        tokenizer: the model's.
        tasks: lm-eval's names of tasks and groups.
        contestants: whose caches.
        limit: at most so many cases of each task.
        shots: examples in a prompt; None for each task's own number.
        include: a folder of more tasks.
        chat: put prompts in the chat template.
        name: of the model in the records; by default the last part of its path.
        out: results file; its records of the same work are replaced, and finished requests are kept beside it, in
            `<out>.pieces`, so that a run that was killed goes on where it stopped.
        progress: told before every request.

    Returns:
        A `task` record for each task and contestant, with every metric's mean and interval: `wilson` or `bootstrap`
        where lm-eval gives a score from 0 to 1 for each case, else `normal`, from its standard error. `cases` has the
        scores of every case.

    Raises:
        DataError: lm-eval knows no such task.
    """
    manager = check_tasks(tasks, include)
    where = surroundings(model, name)
    asked = {"limit": limit, "shots": shots, "chat": chat}
    records: list[Record] = []
    for task in tasks:
        for contestant in contestants:
            reader = KvloomLM(model, tokenizer=tokenizer, contestant=contestant, out=out, progress=progress)
            found = simple_evaluate(
                model=reader,
                tasks=[task],
                num_fewshot=shots,
                limit=limit,
                task_manager=manager,
                apply_chat_template=chat,
                bootstrap_iters=0,
            )
            records += _records(found, contestant, {**asked, **reader.held}, where)
            if out:
                write_records(out, records)
    return records


def check_tasks(tasks: Sequence[str], include: Path | None = None) -> TaskManager:
    """The manager of lm-eval that knows these tasks.

    Args:
        tasks: lm-eval's names of tasks and groups.
        include: a folder of more tasks.

    Raises:
        DataError: lm-eval knows no such task.
    """
    manager = TaskManager(include_path=include and str(include))
    if strange := sorted(set(tasks) - set(manager.all_tasks)):
        said = unknown("lm-eval task", strange[0], manager.all_tasks, listing="`lm-eval ls tasks`").removesuffix(".")
        raise DataError(f"{said}, and --include adds more.")
    return manager


def _records(found: Any, contestant: Contestant, about: Record, where: Record) -> list[Record]:
    return [
        _record(task, scores, found, contestant, about, where)
        for task, results in found["results"].items()
        if (scores := _scores(results, found["samples"].get(task, ())))
    ]


def _record(task: str, scores: Record, found: Any, contestant: Contestant, about: Record, where: Record) -> Record:
    named = f"lm-eval/{task}"
    asked = [about[key] for key in ("limit", "shots", "chat")]
    return {
        "kind": "task",
        "id": fingerprint([contestant.identity, named, asked, *(where[key] for key in ("model", "device", "dtype"))]),
        **contestant.labels,
        "task": named,
        **about,
        "version": found["versions"].get(task),
        "total": found["n-samples"].get(task, {}).get("effective"),
        "metric": next(iter(scores)),
        "score": next(iter(scores.values())),
        "scores": scores,
        "cases": _cases(scores, found["samples"].get(task, ())),
        **where,
    }


def _cases(metrics: Iterable[str], samples: Sequence[Mapping[str, Any]]) -> list[Record]:
    """What every case scored, by the names and filters that `_scores` gives metrics."""
    found: dict[str, dict[str, float]] = {}
    for shown in metrics:
        metric, _, kind = shown.partition(",")
        for case in samples:
            if case.get("filter", "none") == (kind or "none") and isinstance(case.get(metric), int | float):
                found.setdefault(str(case["doc_id"]), {})[shown] = float(case[metric])
    return [{"name": name, "scores": scores} for name, scores in found.items()]


def _scores(results: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> Record:
    """Every metric's mean and interval, by its name and filter."""
    scores: Record = {}
    for key, value in results.items():
        metric, _, kind = key.partition(",")
        if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        cases = [case.get(metric) for case in samples if case.get("filter", kind) == kind]
        shown = metric if kind == "none" else key
        scores[shown] = _interval(value, results.get(f"{metric}_stderr,{kind}"), cases)
    return scores


def _interval(value: float, error: Any, cases: Sequence[Any]) -> Record:
    shares = [float(case) for case in cases if isinstance(case, int | float) and 0 <= case <= 1]
    if shares and len(shares) == len(cases):
        return mean_score(shares)
    reach = _Z * error if isinstance(error, int | float) else None
    ends = {} if reach is None else {"low": value - reach, "high": value + reach}
    return {"value": value, **ends, "interval": "normal"}


def _contestant(model: PreTrainedModel, plan: Plan | str | None, prefill: Any) -> Contestant:
    if plan is None:
        return dense_contestant(model)
    wanted = Plan.load(plan) if isinstance(plan, str) else plan
    return plan_contestant(wanted, model, name="plan", method="plan", prefill=prefill)
