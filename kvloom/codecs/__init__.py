"""Number formats: how values become codes and back, in plain torch; one file a method."""

from __future__ import annotations

from kvloom.codecs._affine import AFFINE, OUT_OF_RANGE, Affine
from kvloom.codecs._base import Codec, Encoded, get, register, wide

__all__ = ["AFFINE", "OUT_OF_RANGE", "Affine", "Codec", "Encoded", "get", "register", "wide"]
