"""Lloyd-Max grids with a scale for each group: ``x_hat = scale * point[code]``, no zero point.

The grid is the best there is for standard normal numbers: every point is the mean of the numbers that are nearest to it
(Lloyd, "Least squares quantization in PCM", 1957, IEEE Trans. Inf. Theory 28, 1982; Max, "Quantizing for minimum
distortion", IRE Trans. Inf. Theory 6, 1960), and one grid alone is so (Fleischer 1964). Scaled by a group's root mean
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

from kvloom.codecs._affine_form import Grid
from kvloom.codecs._base import register
from kvloom.codecs._codebook_form import CodebookForm, nearest_points, normalised
from kvloom.codecs._half import half_near
from kvloom.pages import Format, codec_facts


class Lloyd(CodebookForm):
    """The grid of the least squared error for normal elements, scaled to each group."""

    name = "lloyd"
    facts = codec_facts(name)

    def fit(self, values: torch.Tensor, low: torch.Tensor, high: torch.Tensor, fmt: Format) -> Grid:
        """The root mean square, or the scale of least squares where that has the smaller error.

        See `CodebookForm.fit`.
        """
        points = self.points(fmt, values)
        scale = half_near(values.square().mean(-1, dtype=torch.float64).sqrt())
        fitted = least_squares(values, _chosen(values, scale, points))
        better = _squared_error(values, fitted, points) < _squared_error(values, scale, points)
        return torch.where(better, fitted, scale), None


def least_squares(values: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """The scale of the least squared error of each group, given the points its elements got; fp16."""
    product = (values * chosen).sum(-1, dtype=torch.float64)
    return half_near(product / chosen.square().sum(-1, dtype=torch.float64))


def _chosen(values: torch.Tensor, scale: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """The nearest point of every element."""
    return points[nearest_points(normalised(values, scale, None), points)]


def _squared_error(values: torch.Tensor, scale: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Sum over each group, fp64."""
    decoded = _chosen(values, scale, points) * scale.to(values.dtype)[..., None]
    return (decoded - values).square().sum(-1, dtype=torch.float64)


LLOYD = register(Lloyd())
