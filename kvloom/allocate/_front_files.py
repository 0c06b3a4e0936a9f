"""A front on disk: its plans, a list of them, and a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from kvloom._dtypes import dtype_name
from kvloom._extras import require
from kvloom.allocate._front import predicted_loss
from kvloom.plan import Plan


def save_front(plans: Sequence[Plan], folder: Path, tokens: int, batch: int = 1, dtype: str | None = None) -> list[str]:
    """Writes every plan, `front.json` and `front.png`.

    Args:
        plans: of one model, with predicted losses, by rising bytes.
        folder: made if it is not there.
        tokens: context length at which bytes and true bits are told.
        batch: number of sequences.
        dtype: compute dtype of the tokens kept exactly; None takes the model's.

    Returns:
        Names of the plans' files, in their order.

    Raises:
        MissingExtraError: matplotlib is not installed; nothing is written.
    """
    require("plot", "The picture of a front")
    folder.mkdir(parents=True, exist_ok=True)
    entries = [_entry(n, plan, tokens, batch, dtype) for n, plan in enumerate(plans, start=1)]
    for plan, entry in zip(plans, entries, strict=True):
        plan.save(folder / entry.file)
    about = {"tokens": tokens, "batch": batch, "dtype": dtype_name(dtype or plans[0].model.dtype)}
    listed = {**about, "plans": [asdict(entry) for entry in entries]}
    (folder / "front.json").write_text(json.dumps(listed, indent=2) + "\n", encoding="utf-8")
    _draw(entries, folder / "front.png", f"{plans[0].model.architecture}, {batch} x {tokens:,} tokens")
    return [entry.file for entry in entries]


@dataclass(frozen=True, slots=True)
class _Entry:
    """A plan as `front.json` lists it."""

    file: str
    true_bits: float
    nbytes: int
    predicted_loss: float


def _entry(number: int, plan: Plan, tokens: int, batch: int, dtype: str | None) -> _Entry:
    bits = plan.true_bits(tokens, dtype)
    name = f"plan-{number:02}-{bits:.2f}-bits.json"
    return _Entry(name, bits, plan.nbytes(batch, tokens, dtype), predicted_loss(plan))


def _draw(entries: Sequence[_Entry], path: Path, title: str) -> None:
    """Predicted loss over true bits; plans of no loss have no place on a logarithmic axis."""
    from matplotlib.figure import Figure

    shown = [entry for entry in entries if entry.predicted_loss > 0]
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([it.true_bits for it in shown], [it.predicted_loss for it in shown], marker="o", markersize=4)
    axes.set(yscale="log", xlabel="true bits", ylabel="predicted loss, nats of KL divergence per scored token")
    axes.set_title(title)
    axes.grid(which="both", alpha=0.2)
    figure.savefig(path, dpi=150)
