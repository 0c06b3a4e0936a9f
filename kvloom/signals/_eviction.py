"""Measures what keeping some tokens of a prompt would cost each layer, from a few texts.

A text is a prompt and the tokens that follow it. One pass reads the prompt and shows every policy what it chooses
from; a second one reads what follows, through the cache of the first, and gives gradients (`_after_prompt`). Next
tokens are drawn from the model several times, since a backward pass over the tokens that follow is short.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import DynamicCache

from kvloom.errors import DataError, PlanError
from kvloom.eviction import Policy, Room, make
from kvloom.pages import page_tokens_of
from kvloom.plan import Evict, Fingerprint, Window
from kvloom.signals._after_prompt import AfterPrompt
from kvloom.signals._compute import FOUR_SINKS, Progress, silent
from kvloom.signals._eviction_table import EvictionTable
from kvloom.signals._kept import kept_of, scores_of
from kvloom.signals._measure import at_rest, check_seen, logit_gradient
from kvloom.signals._pieces import Pieces
from kvloom.signals._prompts import Prompts
from kvloom.signals._tap import Tap, Tapped, tapped

if TYPE_CHECKING:
    from transformers import PreTrainedModel

POLICIES = ("snapkv", "adakv", "expected_attention", "snap_expected")
"""Which policies a joint plan chooses among: on SmolLM2-135M those of the least predicted loss."""

SHARES = (1, 2, 3, 4, 6, 8, 10, 12, 14, 16, 20, 24, 28)
"""Pages kept of 32."""

FOLLOWING = 128
"""Tokens of a text that follow its prompt."""

_DRAWS = 8
"""Of next tokens; with one, losses of single layers scatter twice as much."""

_LABEL = "evicting"


def default_candidates(policies: Sequence[str] = POLICIES) -> list[Evict]:
    """Policies with their papers' parameters, each with shares of a prompt from 1/32 to 7/8.

    Raises:
        PlanError: There is no policy of a name.
    """
    for policy in policies:
        make(policy, {})
    return [Evict(policy=policy, budget=share / 32) for policy in policies for share in SHARES]


def compute_eviction(
    model: PreTrainedModel,
    tokens: Tensor,
    *,
    candidates: Sequence[Evict] | None = None,
    following: int = FOLLOWING,
    window: Window = FOUR_SINKS,
    texts: Sequence[str] = (),
    seed: int = 0,
    out: Path | None = None,
    progress: Progress = silent,
) -> EvictionTable:
    """Predicts what every layer loses by keeping some tokens of a prompt.

    Args:
        model: A causal language model whose attention goes through transformers' attention interface.
        tokens: Calibration texts, integers `[prompts, prompt + following]`, about as long as the prompts to come. Take
            them from other texts than those a plan is evaluated on.
        candidates: Policies and shares; by default those of `default_candidates`.
        following: Tokens at the end of each text that follow its prompt.
        window: Tokens the cache will keep exactly; that of the profile the table goes into.
        texts: Names of the texts, for the record.
        seed: Of the drawn next tokens.
        out: The file the table will be saved to: finished pieces are kept beside it, in `<out>.pieces`.
        progress: Called after each text.

    Returns:
        The table, for `Profile.with_eviction`.

    Raises:
        DataError: A text is no longer than what follows its prompt, has nothing to score, or gives no finite loss.
        ModelError: The model's attention cannot be measured.
        PlanError: A candidate's budget is not a share, its policy shares out tokens over layers by itself, or it does
            not go with the window.
    """
    asked = list(candidates or default_candidates())
    shape, prompts = Fingerprint.of(model), Prompts.of(model, tokens, None, seed)
    prompt = prompts.tokens.shape[1] - following
    if prompt < 1 or following < 2:
        raise DataError(
            f"texts have {prompts.tokens.shape[1]} tokens, of which {following} follow the prompt: give longer texts, "
            "and at least 2 tokens that follow."
        )
    rooms = [_room(each, window) for each in asked]
    about = {
        "signal": "eviction",
        "candidates": [each.model_dump(mode="json") for each in asked],
        "window": window.model_dump(mode="json"),
        "following": following,
        "seed": seed,
    }
    pieces = Pieces(out, model, about, [room.policy for room in rooms])
    progress(0, len(prompts), _LABEL)
    rows = []
    for n in range(len(prompts)):
        text = _Text.of(model, prompts.batch(n, 1), following, seed + n * _DRAWS)
        rows.append(pieces.get(dict(text.whole.identity), partial(_piece, model, shape, text, rooms))["loss"])
        progress(n + 1, len(prompts), _LABEL)
    losses = torch.stack(rows).double()
    return EvictionTable(
        model=shape,
        window=window,
        prompt=prompt,
        candidates=asked,
        loss=losses.mean(dim=0).tolist(),
        spread=losses.std(dim=0, correction=0).tolist(),
        calibration=prompts.calibration(texts, seed),
        seconds=pieces.seconds,
    )


def _room(evict: Evict, window: Window) -> Room:
    """How many tokens a layer keeps, whichever it is.

    Raises:
        PlanError: See `compute_eviction`.
    """
    policy = evict.make_policy()
    if type(policy).layer_budget is not Policy.layer_budget:
        raise PlanError(
            f"policy {evict.policy!r} shares out tokens over layers by itself, which a joint plan does: measure "
            "another, such as snapkv."
        )
    if isinstance(evict.budget, int):
        raise PlanError(
            f"budget {evict.budget} of policy {evict.policy!r} is no share of a prompt: give one, such as 0.25."
        )
    sizes = window.sinks, window.recent, window.recent_ratio
    room = Room(policy, evict.budget, evict.protect, *sizes, page_tokens_of(), layer=0, layers=1)
    room.check()
    return room


@dataclass(frozen=True)
class _Text:
    """A prompt and what follows it.

    Attributes:
        whole: Both.
        prompt: int64 `[1, tokens]`.
        draws: What follows, each time with other next tokens.
    """

    whole: Prompts
    prompt: Tensor
    draws: list[Prompts]

    @classmethod
    def of(cls, model: PreTrainedModel, whole: Prompts, following: int, seed: int) -> _Text:
        """A text of `[1, prompt + following]` tokens."""
        prompt, rest = whole.tokens[:, :-following], whole.tokens[:, -following:]
        return cls(whole, prompt, [Prompts.of(model, rest, None, seed + n) for n in range(_DRAWS)])


def _piece(model: PreTrainedModel, shape: Fingerprint, text: _Text, rooms: Sequence[Room]) -> dict[str, Tensor]:
    """`loss`, float32 `[layers, candidates]`."""
    layers = shape.packed_layers
    read, after = Tap(layers, Window(), page_tokens_of()), AfterPrompt(layers)
    cache = DynamicCache(config=model.config)
    with torch.inference_mode(False), at_rest(model):
        with torch.no_grad(), tapped(model, read):
            model.get_decoder()(input_ids=text.prompt.to(model.device), past_key_values=cache, use_cache=True)
        check_seen(model, read)
        with torch.enable_grad(), tapped(model, after):
            rest = text.draws[0].tokens.to(model.device)
            logits = model(input_ids=rest, past_key_values=cache, use_cache=True, return_dict=True).logits
            gradients = list(zip(*_gradients(logits, after, text.draws), strict=True))
    scored = int(text.draws[0].scored.sum())
    rows = []
    with torch.no_grad():
        for layer, own in zip(layers, gradients, strict=True):
            squares = after.caught[layer].squares(_kept(read.caught[layer], rooms), own)
            rows.append(squares[:, 0] / (2.0 * scored))
    return {"loss": torch.stack(rows).float().cpu()}


def _gradients(logits: Tensor, after: AfterPrompt, draws: Sequence[Prompts]) -> Iterator[tuple[Tensor, ...]]:
    """Gradients by the layers' attention outputs, one for each layer, under each draw of next tokens."""
    outputs = [caught.output for caught in after.caught.values()]
    for n, draw in enumerate(draws, start=1):
        start = logit_gradient(draw, "sampled", logits)
        yield torch.autograd.grad(logits, outputs, start, retain_graph=n < len(draws))


def _kept(tapped: Tapped, rooms: Sequence[Room]) -> Iterator[Tensor]:
    """What each candidate keeps; a policy looks once, whatever the share."""
    scores: dict[Policy, Tensor] = {}
    for room in rooms:
        if room.policy not in scores:
            scores[room.policy] = scores_of(tapped, room)
        yield kept_of(scores[room.policy], room)
