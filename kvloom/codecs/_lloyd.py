"""Lloyd-Max grids with a scale for each group: ``x_hat = scale * grid[code]``, no zero point.

The grid is the best there is for standard normal numbers (`kvloom.codecs._normal_grid`). Scaled by a group's root mean
square it is TurboQuant-MSE (Zandieh et al., arXiv 2504.19874, algorithm 1), which keeps the norm of a token's rotated
head vector: coordinates on a sphere of many dimensions are close to normal. Of the squared norm of normal elements the
grid loses 0.3634, 0.1175, 0.0345 and 0.0095 at 1 to 4 bits.

Given the codes, the squared error is least with ``scale = <x, q> / <q, q>``, ``q`` their points: the biased scale of
DRIVE (Vargaftik et al., arXiv 2105.08339) and EDEN (arXiv 2108.08842); Ben-Basat et al. (arXiv 2604.18555) compare it
with TurboQuant's. One such step is taken: codes are chosen anew for the scale of the first ones, and kept where the
group's squared error is smaller than with the root mean square. Errors are those of decoding, with the scale in fp16.

No mean is taken off, and groups off zero waste half of the grid. This is for values and for keys that were rotated, or
that are grouped ``per_channel``, where a large channel cannot spoil others; rotation is the layer's business.
"""

from __future__ import annotations

import torch

from kvloom.codecs._base import Codec, Encoded, register, wide
from kvloom.codecs._groups import group, ungroup
from kvloom.codecs._half import half_near
from kvloom.codecs._normal_grid import grid_edges, grid_points
from kvloom.codecs._range import check_range
from kvloom.pages import Format, codec_facts


class Lloyd(Codec):
    """The grid of the least squared error for normal elements, scaled to each group."""

    name = "lloyd"
    facts = codec_facts(name)

    def encode(self, x: torch.Tensor, fmt: Format) -> Encoded:
        """See `Codec.encode`.

        Raises:
            CacheError: An element is NaN, infinite, or beyond fp16's range, in which scales are stored.
            PlanError: The format stores a zero point.
        """
        self.facts.check(self.name, fmt.bits, fmt.symmetric)
        values = _groups(x, fmt)
        check_range(values.amin(-1), values.amax(-1))
        scale, codes = _fit(values, fmt.bits)
        return Encoded(ungroup(codes.to(torch.uint8), x.shape, fmt), (scale,))

    def decode(self, encoded: Encoded, fmt: Format) -> torch.Tensor:
        """See `Codec.decode`."""
        codes = group(encoded.codes, fmt).int()
        points = grid_points(fmt.bits, torch.float32, codes.device)
        return ungroup(_decoded(codes, encoded.params[0], points), encoded.codes.shape, fmt)

    def bound(self, x: torch.Tensor, fmt: Format) -> torch.Tensor:
        """Half the widest gap of the scaled grid, or how far the element lies beyond its end; see `Codec.bound`."""
        values = _groups(x, fmt)
        scale, _ = _fit(values, fmt.bits)
        points = grid_points(fmt.bits, values.dtype, values.device)
        size, step = values.abs(), scale.to(values.dtype)[..., None]
        end = step * points[-1]
        largest = torch.maximum(step * points.diff().amax() / 2, size - end)
        return ungroup(largest + 4e-7 * (size + end), x.shape, fmt).float()


def _groups(x: torch.Tensor, fmt: Format) -> torch.Tensor:
    """``[..., a, b, group_size]``, contiguous: one order of summation for all."""
    return group(wide(x), fmt).contiguous()


def _fit(values: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and codes of each group: by its root mean square, or by least squares where that has the smaller error.

    Args:
        values: fp32 or fp64 ``[..., group_size]``, contiguous.
        bits: Code width.

    Returns:
        fp16 ``[...]`` and int32 ``[..., group_size]``.
    """
    points = grid_points(bits, values.dtype, values.device)
    scale = half_near(values.square().mean(-1, dtype=torch.float64).sqrt())
    codes = _nearest(values, scale, bits)
    fitted = _least_squares(values, points[codes])
    recoded = _nearest(values, fitted, bits)
    better = _squared_error(values, recoded, fitted, points) < _squared_error(values, codes, scale, points)
    return torch.where(better, fitted, scale), torch.where(better[..., None], recoded, codes)


def _least_squares(values: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """The scale of the least squared error of each group, given the points its elements got; fp16."""
    product = (values * chosen).sum(-1, dtype=torch.float64)
    return half_near(product / chosen.square().sum(-1, dtype=torch.float64))


def _nearest(values: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes of the nearest points of the scaled grid, int32; only signs where the scale is too small for fp16."""
    step = torch.where(scale > 0, scale, 1.0).to(values.dtype)[..., None]
    return torch.bucketize(values / step, grid_edges(bits, values.dtype, values.device), out_int32=True)


def _decoded(codes: torch.Tensor, scale: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Values in the dtype of ``points``."""
    return points[codes] * scale.to(points.dtype)[..., None]


def _squared_error(
    values: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, points: torch.Tensor
) -> torch.Tensor:
    """Sum over each group, fp64."""
    return (_decoded(codes, scale, points) - values).square().sum(-1, dtype=torch.float64)


LLOYD = register(Lloyd())
