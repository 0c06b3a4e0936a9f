"""Comparing two records of one run: differences with their own intervals."""

from __future__ import annotations

from typing import Any

import torch

from kvloom._ledger import Record
from kvloom.errors import DataError
from kvloom.evaluate._bootstrap import Estimate, block_mean, median_interval

_SAME = ("model", "device", "dtype", "context", "unscored")


def paired_difference(ours: Record, theirs: Record) -> dict[str, dict[str, float]]:
    """Compare the mean KLD of two `fidelity` records on the same draws of the same blocks.

    Args:
        ours: a record.
        theirs: another one, of the same model, windows and blocks.

    Returns:
        `difference` (ours - theirs, nats per token) and `ratio` (ours / theirs), each with its 95 %
        interval. Ours is lower beyond doubt where `difference["high"] < 0`.

    Raises:
        DataError: the records are not of the same windows.
    """
    _check_pair(ours, theirs)
    a, b = _mean_kld(ours), _mean_kld(theirs)
    return {
        "difference": (a - b).interval().as_dict(),
        "ratio": (a / b).interval().as_dict(),
    }


def paired_speed(ours: Record, theirs: Record) -> dict[str, float]:
    """How many times faster one `decode` record is than another, step by step.

    Returns:
        Median of their step time / our step time over the rounds, with its 95 % interval.

    Raises:
        DataError: the records are not of the same run.
    """
    if ours.get("run") is None or ours["run"] != theirs.get("run"):
        raise DataError(
            f"The decode records of {ours.get('name')} and {theirs.get('name')} are not of one run,"
            " so their steps do not pair: time both in the same run."
        )
    rounds = zip(theirs["step_s"], ours["step_s"], strict=True)
    return median_interval([slow / fast for slow, fast in rounds]).as_dict()


def _mean_kld(record: Record) -> Estimate:
    blocks = record["blocks"]
    means = torch.tensor(blocks["kld"], dtype=torch.float64)
    return block_mean(means, torch.tensor(blocks["tokens"]))


def _check_pair(ours: Record, theirs: Record) -> None:
    for name in (*_SAME, "text", "blocks"):
        if _compared(ours, name) != _compared(theirs, name):
            raise DataError(
                f"The records of {ours.get('name')} and {theirs.get('name')} differ in {name!r}, so"
                " they cannot be compared token by token: score both on the same windows."
            )


def _compared(record: Record, name: str) -> Any:
    value = record.get(name)
    if name == "text" and isinstance(value, dict):
        return value.get("sha256")
    if name == "blocks" and isinstance(value, dict):
        return value.get("tokens")
    return value
