"""What `Codec.encode` gives: codes and parameters that fit the page, the same however they are asked for."""

from __future__ import annotations

import torch

from kvloom.codecs import Codec, Encoded
from kvloom.pages import CODEBOOK_BITS, Format
from kvloom.testing._samples import pages


def check_facts(codec: Codec) -> None:
    """The codec has a name, and takes formats that pages can hold."""
    if not isinstance(getattr(codec, "name", None), str) or not codec.name:
        raise AssertionError(f"{type(codec).__name__} has no name: plans could not ask for it.")
    wrong = sorted(set(codec.facts.bits) - {1, 2, 3, 4, 5, 6, 8})
    if wrong or not codec.facts.bits:
        raise AssertionError(f"codec {codec.name!r} says it takes {wrong or 'no'} bits, which no page holds.")
    if not codec.facts.symmetries:
        raise AssertionError(f"codec {codec.name!r} says it takes neither symmetric formats nor others.")
    if codec.facts.form == "codebook" and max(codec.facts.bits) > CODEBOOK_BITS:
        raise AssertionError(f"codec {codec.name!r} says it has codebooks of more than {CODEBOOK_BITS} bits.")
    if codec.facts.codebooks and [len(points) for points in codec.facts.codebooks] != [2**b for b in codec.facts.bits]:
        raise AssertionError(f"codec {codec.name!r} has codebooks of other sizes than its bits ask for.")


def check_codes(codec: Codec, fmt: Format) -> None:
    """Codes are uint8 within the format's levels, parameters finite fp16, one of each for each group."""
    x = pages(fmt)
    encoded = codec.encode(x, fmt)
    if encoded.codes.dtype != torch.uint8 or encoded.codes.shape != x.shape:
        raise AssertionError(
            f"{fmt}: codes are {encoded.codes.dtype} {list(encoded.codes.shape)} where uint8 {list(x.shape)} is asked."
        )
    if int(encoded.codes.max()) > fmt.levels:
        raise AssertionError(f"{fmt}: a code is {int(encoded.codes.max())}, above the largest, {fmt.levels}.")
    _check_params(encoded, fmt, x.shape)
    if encoded.codes.unique().numel() == 1:
        raise AssertionError(f"{fmt}: every code of random elements is {int(encoded.codes[0, 0, 0, 0, 0])}.")


def _check_params(encoded: Encoded, fmt: Format, shape: torch.Size) -> None:
    *lead, tokens, channels = shape
    groups = (
        [-(-tokens // fmt.group_size), channels]
        if fmt.grouping == "per_channel"
        else [tokens, channels // fmt.group_size]
    )
    if len(encoded.params) != fmt.num_params:
        raise AssertionError(f"{fmt}: {len(encoded.params)} parameters a group where pages hold {fmt.num_params}.")
    for param in encoded.params:
        if param.dtype != torch.float16 or list(param.shape) != [*lead, *groups]:
            raise AssertionError(
                f"{fmt}: parameters are {param.dtype} {list(param.shape)} where float16 {[*lead, *groups]} is asked."
            )
        if not bool(param.isfinite().all()):
            raise AssertionError(f"{fmt}: a parameter of finite elements is not finite.")


def check_repeats(codec: Codec, fmt: Format) -> None:
    """The same elements give the same codes and parameters each time, and are left as they were."""
    x = pages(fmt)
    before = x.clone()
    first = codec.encode(x, fmt)
    codec.encode(16 * pages(fmt, seed=1), fmt)
    if not x.equal(before):
        raise AssertionError(f"{fmt}: encode changes the elements it is given.")
    if not same(first, codec.encode(x, fmt)):
        raise AssertionError(f"{fmt}: the same elements get other codes the second time.")


def check_pages_apart(codec: Codec, fmt: Format) -> None:
    """A page gets the same codes alone and among others, and so does a group: no re-quantisation, whatever arrives."""
    x = pages(fmt)
    together = codec.encode(x, fmt)
    for index in [(0, 0, 0), (1, 2, 1)]:
        alone = codec.encode(x[index].clone(), fmt)
        if not same(alone, Encoded(together.codes[index], tuple(p[index] for p in together.params))):
            raise AssertionError(f"{fmt}: a page gets other codes alone than among {x.shape[:3].numel()}.")
    span = x.shape[-2] % fmt.group_size or fmt.group_size if fmt.grouping == "per_channel" else 1
    part = codec.encode(x[..., -span:, :].clone(), fmt)
    if not same(part, Encoded(together.codes[..., -span:, :], tuple(p[..., -1:, :] for p in together.params))):
        raise AssertionError(f"{fmt}: the last groups of a page get other codes alone than with the page's others.")


def check_dtypes(codec: Codec, fmt: Format) -> None:
    """fp16 and bf16 get the codes of their values, fp64 is taken, and strides do not matter; decoding gives fp32."""
    x = pages(fmt)
    for dtype in (torch.float16, torch.bfloat16):
        low = x.to(dtype)
        if not same(codec.encode(low, fmt), codec.encode(low.float(), fmt)):
            raise AssertionError(f"{fmt}: {dtype} elements get other codes than the same values in float32.")
    turned = x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if not same(codec.encode(turned, fmt), codec.encode(x, fmt)):
        raise AssertionError(f"{fmt}: a transposed view gets other codes than a contiguous tensor.")
    decoded = codec.decode(codec.encode(x.double(), fmt), fmt)
    if decoded.dtype != torch.float32 or decoded.shape != x.shape:
        raise AssertionError(f"{fmt}: decode gives {decoded.dtype} {list(decoded.shape)}, not float32 {list(x.shape)}.")


def same(a: Encoded, b: Encoded) -> bool:
    """Whether codes and parameters are equal, bit for bit."""
    bits = [[p.contiguous().view(torch.int16) for p in encoded.params] for encoded in (a, b)]
    return a.codes.equal(b.codes) and len(bits[0]) == len(bits[1]) and all(map(torch.equal, *bits))
