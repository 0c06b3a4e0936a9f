"""Drift: does a contestant get worse the longer it decodes?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvloom._ledger import Record, fingerprint
from kvloom.evaluate._bootstrap import block_slope
from kvloom.evaluate._contestants import Contestant, check_names
from kvloom.evaluate._context import Progress, check_model, silent, surroundings, tokens_hash
from kvloom.evaluate._fidelity import (
    Protocol,
    blocks_of,
    check_windows,
    piece_scores,
    score_windows,
)
from kvloom.evaluate._records import open_pieces, write_results

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PER = 1000


def drift(
    model: PreTrainedModel,
    windows: Tensor,
    contestants: Sequence[Contestant],
    *,
    protocol: Protocol | None = None,
    texts: Sequence[str] = (),
    name: str | None = None,
    out: Path | None = None,
    progress: Progress = silent,
) -> list[Record]:
    """Slope of the KLD over decoded steps of real text.

    Args:
        model: a causal language model in evaluation mode.
        windows: int64 token ids `[windows, tokens]`; all but the unscored start and the last token
            are steps.
        contestants: what is scored.
        protocol: by default one token at a time after 128 tokens of prompt. Plans with
            `prefill="quantized"` score the same with a larger chunk, in less time.
        texts: names of the texts the windows come from, for the records.
        name: of the model in the records; by default the last part of its path.
        out: results file, as for `fidelity`.
        progress: told before every piece of work.

    Returns:
        One `drift` record for each contestant: `slope` in nats per token and 1,000 steps with its
        95 % block bootstrap interval (no drift where it holds 0), and the mean KLD of every block
        of steps.

    Raises:
        DataError: as for `fidelity`.
        ModelError: the model is in training mode.
    """
    protocol = protocol or Protocol(chunk=1)
    check_names(contestants)
    check_model(model)
    check_windows(model, windows, contestants, protocol)
    ledger = open_pieces(out, model)
    scored = score_windows(model, windows, contestants, protocol, ledger, progress)
    where = {**surroundings(model, name), "text": {"names": list(texts), "sha256": tokens_hash(windows)}}
    records = [
        _record(contestant, pieces, windows, protocol, where)
        for contestant, pieces in zip(contestants, scored, strict=True)
    ]
    write_results(out, records, model)
    return records


def _record(
    contestant: Contestant, pieces: Sequence[Record], windows: Tensor, protocol: Protocol, where: Record
) -> Record:
    kld, count = piece_scores(pieces).kld, windows.shape[0]
    steps = torch.arange(len(kld) // count).repeat(count)
    block_of = blocks_of(count, windows.shape[1], protocol)
    by_step = kld.double().view(count, -1).mean(dim=0)
    return {
        "kind": "drift",
        "id": fingerprint([contestant.identity, protocol.fields, where["model"], where["device"], where["text"]]),
        **contestant.labels,
        "true_bits": pieces[0]["true_bits"],
        "live_bytes": pieces[0]["live_bytes"],
        "steps": len(by_step),
        "windows": count,
        "chunk": protocol.chunk,
        "block": protocol.block,
        "kld": float(by_step.mean()),
        "slope": block_slope(kld, steps / _PER, block_of).interval().as_dict(),
        "blocks": [float(part.mean()) for part in torch.split(by_step, protocol.block)],
        **where,
    }
