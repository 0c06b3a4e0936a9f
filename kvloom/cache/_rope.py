"""Keys before their rotary embedding: taken back before they are packed, applied again when pages are decoded.

Rotary embeddings (RoFormer, Su et al., arXiv 2104.09864) turn pairs of channels of a key by ``position * inv_freq``, so
that a channel which hardly changes from token to token comes and goes in the cache. KVQuant (Hooper et al., arXiv
2401.18079, "pre-RoPE key quantization") therefore packs keys as they were before.

The angle here is ``slot * inv_freq``, and it is the same for the way back and the way forth: whatever a model really
turned by, keys come out as they went in, up to rounding. So slots serve for positions (in a left-padded batch they
differ by one number for all tokens of a sequence, a turn that all of its keys share), factors on cosine and sine (YaRN)
stay with the keys, and frequencies that grow with the context (dynamic NTK, LongRoPE) may do so: the first ones are
taken, once.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from kvloom.errors import ModelError

_PROBED_POSITION = 17
_TOLERANCE = 0.05  # cosines in bf16 are off by 0.004, another convention by about 1
_LEAVE_OUT = "leave pre_rope out of the plan"


@dataclass(frozen=True)
class Rope:
    """A rotary embedding in the half-rotation convention: channels ``i`` and ``i + len(inv_freq)`` are a pair.

    Attributes:
        inv_freq: Angle a slot of each pair, fp32 ``[pairs]``; channels from ``2 * pairs`` on are not turned.
    """

    inv_freq: torch.Tensor

    def before(self, key: torch.Tensor, slot: int | torch.Tensor) -> torch.Tensor:
        """Keys as they were before the embedding.

        Args:
            key: ``[..., tokens, head_dim]``.
            slot: Slot of the first token, or int slots of all, ``[..., tokens]``.

        Returns:
            The same shape in fp32 (fp64 for fp64).
        """
        return self._turned(key, slot, -1.0)

    def after(self, key: torch.Tensor, slot: int | torch.Tensor) -> torch.Tensor:
        """The inverse of `before`, in the dtype of ``key``."""
        turned = self._turned(key, slot, 1.0)
        if key.dtype == torch.float16:  # a pair may be longer than its larger element
            turned.clamp_(-torch.finfo(key.dtype).max, torch.finfo(key.dtype).max)
        return turned.to(key.dtype)

    def _turned(self, key: torch.Tensor, slot: int | torch.Tensor, sign: float) -> torch.Tensor:
        key = key.to(torch.promote_types(key.dtype, torch.float32))
        slots = torch.arange(slot, slot + key.shape[-2], device=key.device) if isinstance(slot, int) else slot
        angles = slots.double()[..., None] * self.inv_freq.to(key.device, torch.float64)
        cos, sin = angles.cos().to(key.dtype), (sign * angles.sin()).to(key.dtype)
        pairs = len(self.inv_freq)
        first, second, rest = key.tensor_split([pairs, 2 * pairs], dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def rope_of(model: Any, layers: Collection[int]) -> Rope:
    """The rotary embedding of a model, after a look at what it does to the keys of these layers.

    The model reads one token at two positions. A token alone attends to itself, so all that differs between the two is
    the embedding.

    Raises:
        ModelError: Only its config is given, it has no rotary embedding, or a layer does not turn keys like this.
    """
    if not hasattr(model, "get_decoder"):
        raise ModelError(
            f"pre_rope needs a model's rotary embedding, and {type(model).__name__} is no model: give the model itself."
        )
    decoder = model.get_decoder()
    rotary = getattr(decoder, "rotary_emb", None)
    names = ("full_attention_original_inv_freq", "original_inv_freq")
    found = [getattr(rotary, name) for name in names if hasattr(rotary, name)]
    if not found:
        raise ModelError(f"{type(model).__name__} has no rotary embedding to take back from its keys: {_LEAVE_OUT}.")
    rope = Rope(found[0].detach().float())
    here, there = (_keys_at(decoder, model.device, position, layers) for position in (0, _PROBED_POSITION))
    for layer, key in there.items():
        off = key - rope.after(here[layer], _PROBED_POSITION)
        if not float(off.norm()) <= _TOLERANCE * float(key.norm()):
            raise ModelError(
                f"layer {layer} of {type(model).__name__} does not turn its keys by halves of the head, the rotary "
                f"embedding that kvloom can take back: {_LEAVE_OUT}."
            )
    return rope


@torch.no_grad()
def _keys_at(decoder: Any, device: torch.device, position: int, layers: Collection[int]) -> dict[int, torch.Tensor]:
    """Keys of one token alone, at a position: fp32 ``[1, kv_heads, 1, head_dim]`` by layer."""
    cache = DynamicCache(config=decoder.config)
    token = torch.full((1, 1), decoder.config.get_text_config(decoder=True).vocab_size // 2, device=device)
    place = torch.full((1, 1), position, device=device)
    decoder(input_ids=token, position_ids=place, past_key_values=cache, use_cache=True)
    held: Any = cache.layers
    return {layer: held[layer].keys.float() for layer in layers}
