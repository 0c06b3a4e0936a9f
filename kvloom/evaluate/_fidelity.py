"""Fidelity: teacher-forced scoring through the cache.

Windows of real text are fed in chunks, the cache carried over, once through the dense cache and
once through each contestant's. Every scored token is predicted from what the cache holds of its
past; one forward pass over a whole window would never read the cache at all. The first tokens of a
window, which see little or nothing of the past, fill the cache and are not scored.

Plans that evict choose at the end of a prompt. With `Protocol(prompt=True)` the unscored tokens are
one, read exactly in one pass, and the others are decoded: one by one, since a pass of several tokens
would be a prompt of its own, read itself exactly, and pass over what is packed, and what leaves,
while tokens are decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import DynamicCache

from kvloom._ledger import Ledger, Record, fingerprint, pack_floats, unpack_floats
from kvloom._vocabulary import check_vocabulary
from kvloom.cache import local_shape
from kvloom.errors import DataError
from kvloom.evaluate._bootstrap import block_mean, block_quantile
from kvloom.evaluate._contestants import Contestant, check_names, plan_layers
from kvloom.evaluate._context import (
    Progress,
    check_logits,
    check_model,
    conditions,
    reads_at_most,
    silent,
    surroundings,
    tokens_hash,
)
from kvloom.evaluate._live import held
from kvloom.evaluate._records import open_pieces, write_results
from kvloom.evaluate._scores import TokenScores, score_tokens
from kvloom.evaluate._steps import logits_of, stepwise_logits
from kvloom.evaluate._through import attention, check_multiple, chunked_logits, last_logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Protocol:
    """How windows are scored.

    Attributes:
        chunk: tokens of one forward pass; 1 decodes token by token.
        block: consecutive tokens drawn together by the bootstrap.
        unscored: tokens at the start of a window that fill the cache and are not scored.
        prompt: whether those come in one pass, whatever the chunk, and the others one by one (`chunk=1`). Bytes and
            true bits are then those of the cache that holds the prompt.
    """

    chunk: int = 128
    block: int = 128
    unscored: int = 128
    prompt: bool = False

    def __post_init__(self) -> None:
        for name in ("chunk", "block", "unscored"):
            if getattr(self, name) < 1:
                raise DataError(f"{name} is {getattr(self, name)}: give at least 1 token.")
        if self.prompt and self.chunk != 1:
            raise DataError(f"chunk is {self.chunk}: tokens after a prompt come one by one, so give chunk=1.")

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt; 0 where windows are cut into chunks from their start."""
        return self.unscored if self.prompt else 0

    @property
    def fields(self) -> dict[str, int]:
        """The protocol as records have it."""
        prompt = {"prompt": self.prompt_tokens} if self.prompt else {}
        return {"chunk": self.chunk, "block": self.block, "unscored": self.unscored, **prompt}


def fidelity(
    model: PreTrainedModel,
    windows: Tensor,
    contestants: Sequence[Contestant],
    *,
    protocol: Protocol | None = None,
    texts: Sequence[str] = (),
    name: str | None = None,
    out: Path | None = None,
    batch: int = 1,
    reference: Callable[[Tensor], Tensor] | None = None,
    progress: Progress = silent,
) -> list[Record]:
    """Score contestants against the dense cache on the same windows.

    The dense cache's logits of a batch of windows are computed once, in the same chunks, and kept
    while all contestants score these windows: `batch x tokens x vocabulary` floats, the tokens of a
    prompt left out.

    Args:
        model: a causal language model in evaluation mode.
        windows: int64 token ids `[windows, tokens]`.
        contestants: what is scored.
        protocol: chunk, bootstrap block and unscored start, by default 128 tokens each.
        texts: names of the texts the windows come from, for the records.
        name: of the model in the records; by default the last part of its path.
        out: results file; its records of the same contestants, windows and protocol are replaced,
            and finished (contestant, window) pieces are kept beside it, in `<out>.pieces`, so that
            a run that was killed goes on where it stopped and ends with the records it would have
            had.
        batch: windows in one forward pass: as many as a GPU has room for take little more time than
            one.
        reference: gives the dense cache's logits of windows `[batch, tokens]`, from whoever has kept them; by default
            they are computed.
        progress: told before every piece of work.

    Returns:
        One `fidelity` record for each contestant, in their order. KLD is in nats per token,
        intervals are at 95 %, `blocks` has the mean of every bootstrap block (the last block of a
        window takes what remains, less the last token, whose successor is unknown); the perplexity
        ratio and `paired_difference` compare on the same draws of blocks.

    Raises:
        DataError: the windows are empty, too short or too long for the model, hold ids that are not
            in its vocabulary, do not fit a contestant, or give logits that are not finite; or a
            contestant evicts and the protocol has no prompt.
        ModelError: the model is in training mode.
    """
    protocol = protocol or Protocol()
    if batch < 1:
        raise DataError(f"batch is {batch}: score at least one window at a time.")
    check_names(contestants)
    check_model(model)
    check_windows(model, windows, contestants, protocol)
    ledger = open_pieces(out, model)
    scored = score_windows(model, windows, contestants, protocol, ledger, progress, batch, reference=reference)
    context = {
        **surroundings(model, name),
        "text": {"names": list(texts), "sha256": tokens_hash(windows)},
    }
    records = [
        _aggregate(contestant, pieces, windows, protocol, context)
        for contestant, pieces in zip(contestants, scored, strict=True)
    ]
    write_results(out, records, model)
    return records


def score_windows(
    model: PreTrainedModel,
    windows: Tensor,
    contestants: Sequence[Contestant],
    protocol: Protocol,
    ledger: Ledger,
    progress: Progress,
    batch: int = 1,
    kind: str = "fidelity_piece",
    kept: Callable[[Record], Record] = dict,
    reference: Callable[[Tensor], Tensor] | None = None,
) -> list[list[Record]]:
    """Score every (contestant, window) that the ledger does not have yet, `batch` windows at a time.

    Args:
        model: a causal language model in evaluation mode.
        windows: int64 token ids `[windows, tokens]`.
        contestants: what is scored.
        protocol: how.
        ledger: of finished pieces.
        progress: told before every piece of work.
        batch: windows in one forward pass.
        kind: of the pieces in the ledger.
        kept: what the ledger keeps of a piece, by default all of it.
        reference: gives the dense cache's logits of windows; by default they are computed.

    Returns:
        For each contestant what is kept of the pieces of all windows, in order. A piece has packed token scores,
        bytes, seconds.
    """
    shared = {**conditions(model), **protocol.fields}
    keys = [
        [fingerprint({**shared, **own, "window": tokens_hash(window)}) for window in windows]
        for own in (contestant.conditions for contestant in contestants)
    ]
    logits_of_rows = reference or partial(dense_logits, model, protocol=protocol)
    done, total = 0, windows.shape[0] * len(contestants)
    for first, rows in zip(range(0, len(windows), batch), windows.to(model.device).split(batch), strict=True):
        dense = lru_cache(maxsize=1)(partial(logits_of_rows, rows))
        for contestant, own in zip(contestants, keys, strict=True):
            progress(f"window {first + 1}, {contestant.name}", done, total)
            wanted = own[first : first + len(rows)]
            ledger.fill(kind, wanted, partial(_kept_scores, model, rows, contestant, dense, protocol, kept))
            done += len(rows)
    progress("scored", done, total)
    return [[ledger[key] for key in own] for own in keys]


def _kept_scores(
    model: PreTrainedModel,
    rows: Tensor,
    contestant: Contestant,
    reference: Callable[[], Tensor],
    protocol: Protocol,
    kept: Callable[[Record], Record],
) -> list[Record]:
    return [kept(piece) for piece in score_rows(model, rows, contestant, reference(), protocol)]


def piece_scores(pieces: Sequence[Record]) -> TokenScores:
    """Token scores of all windows, joined."""
    return TokenScores.join(
        [TokenScores(**{name: unpack_floats(text) for name, text in piece["scores"].items()}) for piece in pieces]
    )


@torch.no_grad()
def dense_logits(model: PreTrainedModel, rows: Tensor, protocol: Protocol) -> Tensor:
    """Logits `[batch, tokens, vocabulary]` of windows `[batch, tokens]`, those of a prompt left out.

    What comes after a prompt comes in one pass, which reads the same.
    """
    cache = DynamicCache(config=model.config)
    with attention(model, packed=False):
        if protocol.prompt:
            last_logits(model, cache, rows[:, : protocol.prompt_tokens])
            return check_logits(logits_of(model, cache, rows[:, protocol.prompt_tokens :]), "the dense cache")
        pieces = chunked_logits(model, cache, rows, protocol.chunk)
        return torch.cat([check_logits(logits, "the dense cache") for logits in pieces], dim=1)


@torch.no_grad()
def score_rows(
    model: PreTrainedModel,
    rows: Tensor,
    contestant: Contestant,
    reference: Tensor,
    protocol: Protocol,
) -> list[Record]:
    """A piece for each of the windows `[batch, tokens]`."""
    started = perf_counter()
    (batch, tokens), shape = rows.shape, local_shape(model)
    read = start = protocol.prompt_tokens
    cache = contestant.cache_for(tokens, tokens - start if protocol.chunk == 1 else 0)
    parts: list[list[TokenScores]] = [[] for _ in rows]
    kept: Record | None = None
    with attention(model, packed=contestant.plan is not None):
        if protocol.prompt:
            scores = last_logits(model, cache, rows[:, :start])
            kept = held(contestant, cache, shape, batch)
            passes = stepwise_logits(model, cache, rows[:, start:], scores)
        else:
            passes = chunked_logits(model, cache, rows, protocol.chunk, contestant.offset)
        for logits in passes:
            check_logits(logits, contestant.name)
            first, stop = max(start, protocol.unscored), min(start + logits.shape[1], tokens - 1)
            if first < stop:
                own, dense = logits[:, first - start : stop - start], reference[:, first - read : stop - read]
                for row, part in enumerate(parts):
                    part.append(score_tokens(dense[row], own[row], rows[row, first + 1 : stop + 1]))
            start += logits.shape[1]
    about = {
        "name": contestant.name,
        **(kept or held(contestant, cache, shape, batch)),
        "seconds": round((perf_counter() - started) / batch, 3),
    }
    joined = [TokenScores.join(part) for part in parts]
    return [{**about, "scores": {name: pack_floats(value) for name, value in vars(each).items()}} for each in joined]


def _aggregate(
    contestant: Contestant,
    pieces: Sequence[Record],
    windows: Tensor,
    protocol: Protocol,
    context: Record,
) -> Record:
    scores = piece_scores(pieces)
    count, context_tokens = windows.shape
    block_of = blocks_of(count, context_tokens, protocol)
    tokens = block_of.bincount()
    means = {name: _block_means(value, block_of) for name, value in vars(scores).items()}
    nll, dense_nll = block_mean(means["nll"], tokens), block_mean(means["dense_nll"], tokens)
    return {
        "kind": "fidelity",
        "id": fingerprint(
            {
                **contestant.identity,
                **protocol.fields,
                "on": [context[key] for key in ("model", "device", "dtype", "text")],
            }
        ),
        **contestant.labels,
        "true_bits": pieces[0]["true_bits"],
        "live_bytes": pieces[0]["live_bytes"],
        "context": context_tokens,
        "windows": count,
        "scored_tokens": scores.tokens,
        "chunk": protocol.chunk,
        "offset": contestant.offset,
        "unscored": protocol.unscored,
        "prompt": protocol.prompt_tokens,
        "ppl": nll.exp().interval().as_dict(),
        "ppl_ratio": (nll - dense_nll).exp().interval().as_dict(),
        "kld": block_mean(means["kld"], tokens).interval().as_dict(),
        "kld_p99": block_quantile(scores.kld, block_of, 0.99).interval().as_dict(),
        "top1": block_mean(means["top1"], tokens).interval().as_dict(),
        "blocks": {
            "size": protocol.block,
            "tokens": tokens.tolist(),
            **{name: values.tolist() for name, values in means.items()},
        },
        "layers": plan_layers(contestant.plan),
        "settings": dict(contestant.settings),
        "seconds": round(sum(piece["seconds"] for piece in pieces), 3),
        **context,
    }


def blocks_of(windows: int, tokens: int, protocol: Protocol) -> Tensor:
    """The bootstrap block of every scored token, `[windows * scored]`.

    No block spans windows; the last one of a window is up to half a block shorter or longer.
    """
    scored = tokens - protocol.unscored - 1
    blocks = max(1, round(scored / protocol.block))
    inside = (torch.arange(scored) // protocol.block).clamp_max(blocks - 1)
    return (inside + blocks * torch.arange(windows)[:, None]).flatten()


def _block_means(values: Tensor, block_of: Tensor) -> Tensor:
    sums = torch.zeros(int(block_of.max()) + 1, dtype=torch.float64)
    return sums.index_add_(0, block_of, values.double()) / block_of.bincount()


def check_windows(
    model: PreTrainedModel, windows: Tensor, contestants: Sequence[Contestant], protocol: Protocol
) -> None:
    """Refuse windows that cannot be scored; see `fidelity`."""
    if windows.dim() != 2 or windows.numel() == 0 or windows.dtype != torch.int64:
        raise DataError(
            f"windows is {windows.dtype} of shape {list(windows.shape)}: give int64 token ids "
            "[windows, tokens], at least one window."
        )
    tokens, least = windows.shape[1], protocol.unscored + protocol.block
    if tokens < least:
        raise DataError(
            f"windows hold {tokens} tokens each, but {protocol.unscored} are not scored and a block"
            f" has {protocol.block}: give windows of at least {least} tokens."
        )
    longest = reads_at_most(model)
    if longest and tokens > longest:
        raise DataError(
            f"windows hold {tokens} tokens each, and the model reads at most {longest}: give shorter windows."
        )
    check_vocabulary(model, windows)
    for contestant in contestants:
        if contestant.evicts and not protocol.prompt:
            raise DataError(
                f"{contestant.name} evicts at the end of a prompt: score it after one, with Protocol(chunk=1, "
                "unscored=..., prompt=True)."
            )
        check_multiple(contestant, "chunk", protocol.chunk)
        rest = tokens % protocol.chunk
        if protocol.chunk % contestant.exact_tail or rest >= contestant.exact_tail:
            check_multiple(contestant, "window", tokens)
