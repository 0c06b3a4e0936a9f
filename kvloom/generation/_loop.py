"""The loop behind ``model.generate(..., custom_generate=kvloom.decode_loop)``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeGuard, cast

import torch
from torch import Tensor

from kvloom.cache import LoomCache, StepLayer
from kvloom.errors import CacheError, ModelError
from kvloom.generation._mirror import Mirror
from kvloom.generation._prompt import Prompt
from kvloom.generation._step import step_of
from kvloom.generation._told import Told

if TYPE_CHECKING:
    from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
    from transformers.generation.streamers import BaseStreamer
    from transformers.generation.utils import GenerateDecoderOnlyOutput

# Inputs that change nothing here, whatever their value.
_TAKEN = frozenset(
    {"attention_mask", "past_key_values", "use_cache", "logits_to_keep", "position_ids", "cache_position"}
)


@torch.no_grad()
def decode_loop(
    model: PreTrainedModel,
    input_ids: torch.LongTensor,
    *,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    token_streamer: BaseStreamer | None = None,
    **inputs: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """Decode with a `LoomCache` of fixed size; on a GPU every step is one replayed CUDA graph.

    ``model.generate(**inputs, past_key_values=LoomCache(plan, model, max_tokens=...), custom_generate=decode_loop)``
    gives the tokens that ``generate`` gives by itself, greedily or by sampling, with its processors and stopping
    criteria. The host works on a step while the device is at the next one. torch compiles the pass of one token first;
    with ``disable_compile=True`` it is captured as it is, in seconds, which leaves steps a third slower.

    Args:
        model: A causal language model, with `kvloom.enable`.
        input_ids: int64 ``[batch, tokens]``; all of them, or with a longer ``attention_mask`` those not in the cache.
        logits_processor: Of ``generate``.
        stopping_criteria: Of ``generate``.
        generation_config: Of ``generate``.
        token_streamer: What ``streamer`` is to ``generate``, which does not hand that one on.
        **inputs: Of ``generate``: ``past_key_values``, the cache, and ``attention_mask``, ``[batch, tokens]``, 0 where
            a prompt is padded on the left; of others only those that change nothing are taken.

    Returns:
        int64 ``[batch, tokens]``, or what ``return_dict_in_generate`` asks for.

    Raises:
        CacheError: The cache is no `LoomCache` of fixed size, has no room for ``max_length`` tokens, or packed NaN.
        ModelError: The model has layers of linear attention, or ``generate`` was asked for beams, an assistant, inputs
            other than text, attentions or hidden states.
    """
    _check_request(generation_config, inputs)
    cache = _checked(inputs.get("past_key_values"))
    if token_streamer is not None:
        token_streamer.put(input_ids.cpu())
    held = int(cache.get_seq_length())
    prompt, limit = Prompt.of(input_ids, inputs.get("attention_mask"), held), int(generation_config.max_length)
    batch, length = input_ids.shape
    cache.check(room_for=prompt.new.shape[1] + max(0, limit - length - 1))
    options = {"logits_to_keep": 1} if inputs.get("logits_to_keep") else {}
    logits = prompt.read(model, cache, generation_config.prefill_chunk_size, options)
    held = prompt.tokens
    ids = input_ids.new_full((batch, max(limit, length + 1)), _pad_token(generation_config))
    pad = ids[0, -1].clone()
    ids[:, :length] = input_ids
    unfinished = torch.ones(batch, dtype=torch.bool, device=ids.device)
    told, mirror, step = Told(generation_config), Mirror(ids.device, batch), None
    while True:
        told.add_logits(logits)
        scores = cast(Any, logits_processor)(ids[:, :length], logits)
        told.add_scores(scores)
        chosen = torch.where(unfinished, _chosen(scores, bool(generation_config.do_sample)), pad)
        ids[:, length] = chosen
        length += 1
        unfinished = unfinished & ~stopping_criteria(ids[:, :length], told.scores)
        mirror.take(chosen, unfinished)
        is_last = length >= limit
        # What cannot be taken back exactly has to be wanted: the host waits before such a step.
        waits = is_last or not _undoes_step(cache, held)
        if (waits and not mirror.show(token_streamer)) or is_last:
            break
        if step is None:
            step = step_of(model, cache, ~prompt.mask, logits, _compiles(model, generation_config))
            step.position.copy_(prompt.next_position())
        step.token.copy_(chosen[:, None])
        step(cache)
        logits, held = step.scores, held + 1
        if not waits and not mirror.show(token_streamer):
            cache.crop(-1)
            break
    if token_streamer is not None:
        token_streamer.end()
    cache.check()
    return told.output(ids[:, :length].clone(), cache)


def serves(cache: object) -> TypeGuard[LoomCache]:
    """Whether `decode_loop` can decode with a cache: a `LoomCache` of fixed size without layers of other kinds."""
    return (
        isinstance(cache, LoomCache)
        and cache.max_tokens is not None
        and all(isinstance(layer, StepLayer) for layer in cache.layers)
    )


def _check_request(config: GenerationConfig, inputs: dict[str, Any]) -> None:
    asked = [name for name in inputs.keys() - _TAKEN if inputs[name] is not None]
    asked += [name for name in ("output_attentions", "output_hidden_states") if getattr(config, name)]
    asked += ["num_beams"] * ((config.num_beams or 1) > 1) + ["prompt_lookup_num_tokens"] * bool(
        config.prompt_lookup_num_tokens
    )
    if asked:
        raise ModelError(f"decode_loop does not take {asked[0]}: leave it out, or leave out custom_generate.")


def _checked(cache: Any) -> LoomCache:
    if not isinstance(cache, LoomCache) or cache.max_tokens is None:
        raise CacheError(
            "decode_loop decodes with a cache of fixed size: give past_key_values=LoomCache(plan, model, "
            "max_tokens=...), or leave out custom_generate."
        )
    if others := [i for i, layer in enumerate(cache.layers) if not isinstance(layer, StepLayer)]:
        raise ModelError(
            f"layer {others[0]} of the model has neither full nor sliding-window attention, which decode_loop does not "
            "serve: leave out custom_generate."
        )
    if not all(layer.is_enabled() for layer in cache.packed_layers.values()):
        raise ModelError("decode_loop needs attention that reads pages: call kvloom.enable(model) first.")
    return cache


def _compiles(model: PreTrainedModel, config: GenerationConfig) -> bool:
    return model.device.type == "cuda" and not config.disable_compile


def _pad_token(config: GenerationConfig) -> int:
    """What stands behind the end of a sequence; transformers' choice where none is named."""
    ends = config.eos_token_id
    first = ends[0] if isinstance(ends, list) else ends
    return int(next((token for token in (config.pad_token_id, first) if token is not None), 0))


def _chosen(scores: Tensor, sample: bool) -> Tensor:
    """int64 ``[batch]``."""
    if not sample:
        return scores.argmax(dim=-1)
    return torch.multinomial(scores.softmax(dim=-1), num_samples=1).squeeze(1)


def _undoes_step(cache: LoomCache, tokens: int) -> bool:
    """Whether a token that follows so many can be taken back."""
    return all(layer.undoes_step(tokens) for layer in cache.layers if isinstance(layer, StepLayer))
