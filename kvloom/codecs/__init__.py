"""Number formats: how values become codes and back, in plain torch; one file a method."""

from __future__ import annotations

from kvloom.codecs._affine import AFFINE, Affine
from kvloom.codecs._affine_form import AffineForm, Grid
from kvloom.codecs._base import Codec, Encoded, get, names, register, registered, wide
from kvloom.codecs._calibrated import dual_of, fitted
from kvloom.codecs._clipped import CLIPPED, Clipped
from kvloom.codecs._codebook_form import CodebookForm
from kvloom.codecs._groups import group
from kvloom.codecs._hqq import HQQ, Hqq
from kvloom.codecs._kvmix3 import KVMIX3, Kvmix3
from kvloom.codecs._lloyd import LLOYD, Lloyd
from kvloom.codecs._nuq import NUQ, Nuq
from kvloom.codecs._outliers import Outliers, joined, split
from kvloom.codecs._quanto import QUANTO, Quanto
from kvloom.codecs._range import OUT_OF_RANGE
from kvloom.codecs._rotation import dual, hadamard_power, rotated, signs
from kvloom.codecs._stored import as_stored

__all__ = [
    "AFFINE",
    "CLIPPED",
    "HQQ",
    "KVMIX3",
    "LLOYD",
    "NUQ",
    "OUT_OF_RANGE",
    "QUANTO",
    "Affine",
    "AffineForm",
    "Clipped",
    "CodebookForm",
    "Codec",
    "Encoded",
    "Grid",
    "Hqq",
    "Kvmix3",
    "Lloyd",
    "Nuq",
    "Outliers",
    "Quanto",
    "as_stored",
    "dual",
    "dual_of",
    "fitted",
    "get",
    "group",
    "hadamard_power",
    "joined",
    "names",
    "register",
    "registered",
    "rotated",
    "signs",
    "split",
    "wide",
]
