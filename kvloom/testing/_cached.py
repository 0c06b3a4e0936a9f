"""A codec inside a cache: what is packed, how many bytes it takes, and what attention reads of it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig

from kvloom.cache import ATTENTION, LoomCache, loom_attention
from kvloom.codecs import Codec, registered
from kvloom.pages import Format, PagedKV, pack_side, page_layout, page_tokens_of
from kvloom.plan import Fingerprint, LayerPlan, Plan, TensorSpec
from kvloom.testing._formats import HEAD_DIM
from kvloom.testing._samples import states

KV_HEADS, QUERY_HEADS = 2, 4
SCALING = 0.02
TOLERANCE = 1e-4


def check_lengths(codec: Codec, fmt: Format) -> None:
    """One token, a page less one, a page and more: the cache is the same whether tokens come at once or one by one."""
    page = page_tokens_of(fmt)
    with registered(codec):
        for tokens in (1, page - 1, page, 2 * page + 13):
            once, pieces, singly = (_filled(fmt, tokens, chunk) for chunk in (tokens, 37, 1))
            if not (_same(once, pieces) and _same(once, singly)):
                raise AssertionError(f"{fmt}: {tokens} tokens leave another cache when they come one by one.")


def check_bytes(codec: Codec, fmt: Format) -> None:
    """What the plan says, what is resident and what a file holds are the same number of bytes."""
    with registered(codec), tempfile.TemporaryDirectory() as folder:
        _check_record(codec, fmt)
        for tokens in (1, page_tokens_of(fmt) + 1, 3 * page_tokens_of(fmt)):
            cache = _filled(fmt, tokens, tokens)
            path = Path(folder) / f"{tokens}.safetensors"
            cache.save(path)
            saved = sum(tensor.numel() * tensor.element_size() for tensor in load_file(path).values())
            planned = cache.plan.nbytes(1, tokens, "float32")
            if not planned == cache.nbytes() == saved:
                raise AssertionError(
                    f"{fmt}: {tokens} tokens are {planned} bytes in the plan, {cache.nbytes()} in memory and {saved} "
                    "in a file."
                )


def _check_record(codec: Codec, fmt: Format) -> None:
    side = page_layout(fmt, fmt, HEAD_DIM).key
    encoded = codec.encode(states(side.page_tokens), fmt)
    packed = pack_side(encoded.codes, encoded.params, side).shape[-1]
    if packed != side.nbytes:
        raise AssertionError(f"{fmt}: the keys of a page take {packed} bytes; a page has {side.nbytes} for them.")


def check_saved(codec: Codec, fmt: Format) -> None:
    """A cache read from a file is the cache that was written, and goes on as that does."""
    tokens = page_tokens_of(fmt) + 21
    with registered(codec), tempfile.TemporaryDirectory() as folder:
        cache = _filled(fmt, tokens, tokens)
        path = Path(folder) / "cache.safetensors"
        cache.save(path)
        again = LoomCache.load(path, cache.plan, tiny_config())
        for way in (cache, again):
            _feed(way, states(page_tokens_of(fmt), seed=9), chunk=page_tokens_of(fmt))
        if not _same(cache, again):
            raise AssertionError(f"{fmt}: a cache that was saved and loaded differs from the one that was not.")


def check_attention(codec: Codec, fmt: Format) -> None:
    """Attention over packed pages gives what attention over `Codec.decode`'s values gives."""
    tokens = 2 * page_tokens_of(fmt) + 5
    with registered(codec):
        cache = _filled(fmt, tokens, tokens)
        handle = _feed(cache, states(1, seed=7), chunk=1)
    key, value = (_as_decoded(codec, x[:, :, :tokens], handle, fmt) for x in _key_value(states(tokens)))
    key, value = torch.cat([key, handle.tail.key[:, :, -1:]], 2), torch.cat([value, handle.tail.value[:, :, -1:]], 2)
    query = torch.randn(1, QUERY_HEADS, 1, HEAD_DIM, generator=torch.Generator().manual_seed(3))
    with registered(codec):
        output = loom_attention(torch.nn.Module(), query, handle, handle, None, scaling=SCALING)[0]
    expected = _slow_attention(query, key, value)
    off = float((output.double() - expected).abs().max() / expected.abs().max())
    if not off <= TOLERANCE:
        raise AssertionError(
            f"{fmt}: attention over the pages is {off:.1e} off attention over the decoded values; a codec of affine "
            "form decodes as scale * code + zero, one of codebook form as scale * point[code] + zero, any other has to "
            "say so in its facts."
        )


def tiny_config() -> LlamaConfig:
    """Of a model of one layer whose attention reads packed pages."""
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=QUERY_HEADS * HEAD_DIM,
        num_hidden_layers=1,
        num_attention_heads=QUERY_HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
    )
    config._attn_implementation = ATTENTION
    return config


def _filled(fmt: Format, tokens: int, chunk: int) -> LoomCache:
    """A cache of one layer that holds the first ``tokens`` of the samples, keys and values in one format."""
    config = tiny_config()
    spec = TensorSpec.model_validate(
        {
            "codec": fmt.codec,
            "bits": fmt.bits,
            "grouping": fmt.grouping,
            "group_size": fmt.group_size,
            "symmetric": fmt.symmetric,
            "codebook": fmt.codebook,
        }
    )
    plan = Plan(model=Fingerprint.of(config), layers=(LayerPlan(layers=0, key=spec, value=spec),))
    cache = LoomCache(plan, config)
    _feed(cache, states(tokens), chunk)
    return cache


def _key_value(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values that differ, of one sample."""
    return x, x.flip(-1) - 1


def _feed(cache: LoomCache, x: torch.Tensor, chunk: int) -> PagedKV:
    """Append in chunks; what attention is handed at the last."""
    key, value = _key_value(x)
    for k, v in zip(key.split(chunk, dim=2), value.split(chunk, dim=2), strict=True):
        handle: PagedKV = cache.update(k, v, 0)[0]
    return handle


def _same(a: LoomCache, b: LoomCache) -> bool:
    ours, theirs = (dict(cache.packed_layers[0].tensors()) for cache in (a, b))
    return ours.keys() == theirs.keys() and all(tensor.equal(theirs[name]) for name, tensor in ours.items())


def _as_decoded(codec: Codec, x: torch.Tensor, handle: PagedKV, fmt: Format) -> torch.Tensor:
    """The packed tokens of ``x [1, heads, tokens, head_dim]`` through the codec, the others as they are."""
    packed = handle.num_pages * handle.page_tokens
    whole = x[:, :, :packed].unflatten(2, (handle.num_pages, handle.page_tokens))
    return torch.cat([codec.decode(codec.encode(whole, fmt), fmt).flatten(2, 3), x[:, :, packed:]], dim=2)


def _slow_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Any:
    """float64 ``[1, queries, query_heads, head_dim]``."""
    key, value = (x.double().repeat_interleave(QUERY_HEADS // KV_HEADS, dim=1) for x in (key, value))
    weights = torch.softmax(query.double() @ key.transpose(-1, -2) * SCALING, dim=-1)
    return (weights @ value).transpose(1, 2)
