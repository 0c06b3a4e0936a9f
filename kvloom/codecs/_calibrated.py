"""Calibrated rotations: the matrix of a head's channels under which storing them costs its readers least.

States ``x`` are cached as ``x F``, and what reads them is turned by the dual ``G = F^-T``, so that products stay what
they are (`kvloom.codecs.dual`). A reader ``r`` (a query; for values, a row of the output projection) meets the storage
error ``e`` of ``x F`` as ``(r G) . e``. Scalar quantisation makes errors that are independent from channel to channel,
with a variance proportional to the channel's own, so the expected squared error is proportional to

    sum_i A_ii B_ii,    A = F^T C F,    B = G^T M G

with ``C`` the covariance of the states within a group and ``M`` the second moment of the readers. Of all invertible
``F`` the least is ``(sum_i d_i)^2 / head_dim`` with ``d_i^2`` the eigenvalues of ``C M`` (Cauchy-Schwarz on
``A_ii B_ii``). It is reached by ``F = S^(1/2) U H``: the geometric mean ``S`` of ``C^-1`` and ``M`` solves ``S C S =
M``, so that ``S^(1/2)`` makes ``A`` and ``B`` equal; ``U`` are the eigenvectors of what they then are; and the
randomised Hadamard transform ``H`` spreads the ``d_i`` evenly over the channels.

The idea of turning keys by what queries look at and of mixing by a Hadamard transform afterwards is OSCAR's (arXiv
2605.17757), whose matrix is the orthogonal ``U H`` of ``M`` alone (its bit reversal reorders channels, which changes
nothing where groups do not cut through a head). Measured on SmolLM2-135M (``benchmarks/LOG.md``), that was no better
than the Hadamard transform alone; this was, by 8 % of the KL divergence at 2 bits and 22 % at 4.
"""

from __future__ import annotations

import torch

from kvloom.codecs._rotation import rotated, signs

_RIDGE = 1e-3


def fitted(states: torch.Tensor, readers: torch.Tensor) -> torch.Tensor:
    """The matrix ``F`` of the least expected squared error, up to a factor that keeps the states' total variance.

    Args:
        states: Covariance ``C`` of the states, ``[..., head_dim, head_dim]``, positive semi-definite.
        readers: Second moment ``M`` of what reads them, the same shape; a factor does not matter.

    Returns:
        float16, the shape of ``states``. A thousandth of their mean eigenvalue is added to ``C`` and ``M`` first:
        directions that calibration did not meet must not be lost.
    """
    c, m = _ridged(states.double()), _ridged(readers.double())
    root = _power(c, 0.5)
    inverse = _power(c, -0.5)
    half = _power(inverse @ _power(root @ m @ root, 0.5) @ inverse, 0.5)
    _, vectors = torch.linalg.eigh(half @ c @ half)
    f = half @ (_interleaved(vectors) @ _mixing(c.shape[-1]))
    kept = c.diagonal(dim1=-2, dim2=-1).sum(-1) / (f.mT @ c @ f).diagonal(dim1=-2, dim2=-1).sum(-1)
    scaled: torch.Tensor = f * kept.sqrt()[..., None, None]
    return scaled.half()


def dual_of(forward: torch.Tensor) -> torch.Tensor:
    """``G = F^-T`` of matrices ``[..., head_dim, head_dim]``, float64."""
    inverse: torch.Tensor = torch.linalg.inv(forward.double())
    return inverse.mT.contiguous()


def _ridged(moment: torch.Tensor) -> torch.Tensor:
    """Scaled to a mean eigenvalue of one, plus the ridge; an all-zero moment becomes the ridge alone."""
    eye = torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
    mean = moment.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    scaled: torch.Tensor = moment / mean.clamp(min=torch.finfo(moment.dtype).tiny)
    return scaled + _RIDGE * eye


def _power(matrix: torch.Tensor, exponent: float) -> torch.Tensor:
    """Of symmetric positive definite matrices."""
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    power: torch.Tensor = (vectors * values.pow(exponent)[..., None, :]) @ vectors.mT
    return power


def _interleaved(vectors: torch.Tensor) -> torch.Tensor:
    """Columns in an order that gives each block of the Hadamard transform large and small ones alike."""
    dim = vectors.shape[-1]
    order = torch.arange(dim, device=vectors.device).view(dim & -dim, -1).T.reshape(-1)
    return vectors[..., order]


def _mixing(head_dim: int) -> torch.Tensor:
    """The orthogonal Hadamard transform, ``[head_dim, head_dim]`` float64."""
    matrix = rotated(torch.eye(head_dim, dtype=torch.float64), signs("hadamard", head_dim))
    length: torch.Tensor = torch.linalg.vector_norm(matrix, dim=0)
    return matrix / length
