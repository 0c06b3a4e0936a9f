"""KVmix's 3 bits, for comparison: eleven codes in a 32-bit word, the last of them in two bits.

KVmix (arXiv 2506.08018, eq. 12; ``min_max_quantize_kernel`` and ``pack_data_kernel`` in
quant_cuda/csrc/quantization_cuda.cu of LfLab-AI/KVmix) groups eleven consecutive tokens of a channel: ``scale = (max -
min) / 7``, ``code = round((x - min) / scale)`` in fp32, halves away from zero, ``x_hat = scale * code + min`` with
scale and minimum rounded to fp16. Ten codes have three bits and the eleventh has two, on the same scale: of every
eleventh token all above ``min + 3/7`` of the range is cut off. Of normal elements that loses a mean squared error of
0.080, where plain 3 bits in groups of 32 lose 0.028. A constant group, for which KVmix divides 0 by 0, decodes to its
minimum.

The numbers are KVmix's, the places of the bits are the page's. A page is no multiple of eleven tokens, so groups start
anew on every page and the last one is shorter: nine tokens of 64, without an eleventh, so that normal elements lose
0.070. In the planes of a page 64 codes take 192 bits, as they do in six words; with six scales and six minima that is
6.0 true bits an element. KVmix's own caches, in whole elevens, take 64 bits for eleven codes, 5.82; plain 4 bits in
groups of 32, which lose 0.006, take 5.0.
"""

from __future__ import annotations

import torch

from kvloom.codecs._base import Codec, Encoded, register
from kvloom.codecs._range import check_range
from kvloom.pages import Format, codec_facts

_LEVELS, _LAST_LEVELS = 7, 3


class Kvmix3(Codec):
    """KVmix's grid of eleven tokens, the eleventh cut off."""

    name = "kvmix3"
    facts = codec_facts(name)

    def encode(self, x: torch.Tensor, fmt: Format) -> Encoded:
        """See `Codec.encode`; ``tokens`` is a page.

        Raises:
            CacheError: An element is NaN, infinite, or beyond fp16's range, in which scales are stored.
            PlanError: The format has another width, grouping or group size, or stores no zero point.
        """
        self.facts.check(self.name, fmt.bits, fmt.symmetric)
        self.facts.check_group(self.name, fmt.grouping, fmt.group_size)
        values, low, scale = _fit(x, fmt)
        codes = _rounded((values - low) / scale).clamp_(max=_LEVELS)
        codes[..., -1, :].clamp_(max=_LAST_LEVELS)
        return Encoded(_tokens(codes, x).to(torch.uint8), (scale.squeeze(-2).half(), low.squeeze(-2).half()))

    def decode(self, encoded: Encoded, fmt: Format) -> torch.Tensor:
        """See `Codec.decode`."""
        spread = (param.float().unsqueeze(-2).expand(*param.shape[:-1], fmt.group_size, -1) for param in encoded.params)
        scale, low = (_tokens(param, encoded.codes) for param in spread)
        return encoded.codes * scale + low

    def bound(self, x: torch.Tensor, fmt: Format) -> torch.Tensor:
        """Half a step, or what the eleventh token lies above its last level, and the roundings; see `Codec.bound`."""
        values, low, scale = _fit(x, fmt)
        largest = (scale / 2).expand(values.shape).clone()
        beyond = values[..., -1, :] - (low + _LAST_LEVELS * scale)[..., 0, :]
        largest[..., -1, :] = torch.maximum(largest[..., -1, :], beyond)
        rounding = (low.abs() + _LEVELS * scale) * 2**-10 + 1e-6
        return _tokens(largest + rounding, x)


def _fit(x: torch.Tensor, fmt: Format) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Groups fp32 ``[..., groups, group_size, head_dim]``, and the minimum and step of each, ``[..., groups, 1, ...]``.

    The last group is filled up with its last token, which changes neither.
    """
    values = x.float()
    missing = -values.shape[-2] % fmt.group_size
    values = torch.cat([values, values[..., -1:, :].expand(*values.shape[:-2], missing, -1)], dim=-2)
    values = values.unflatten(-2, (-1, fmt.group_size))
    low, high = values.amin(-2, keepdim=True), values.amax(-2, keepdim=True)
    check_range(low, high)
    return values, low, (high - low) / high.new_full((1,), _LEVELS)


def _rounded(x: torch.Tensor) -> torch.Tensor:
    """The nearest integers, halves upwards, of what is not negative; 0 of what is no number."""
    whole = x.nan_to_num(0.0).floor()
    return whole + (x - whole >= 0.5)


def _tokens(groups: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``[..., groups, group_size, head_dim]`` as ``[..., tokens, head_dim]``."""
    return groups.flatten(-3, -2)[..., : like.shape[-2], :]


KVMIX3 = register(Kvmix3())
