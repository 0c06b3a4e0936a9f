"""Codecs as users might write them: one that is right and of no affine form, and many that are wrong."""

from __future__ import annotations

import torch

from kvloom.codecs import Affine, Encoded, Lloyd, wide
from kvloom.codecs._groups import group, ungroup
from kvloom.pages import CodecFacts, Format, codec_facts

BITS = (2, 5)


class Rooted(Affine):
    """A uniform grid over signed square roots: finer steps near zero. Only it can decode."""

    name = "rooted"
    facts = CodecFacts(form="opaque", bits=BITS)

    def encode(self, x: torch.Tensor, fmt: Format) -> Encoded:
        x = wide(x)
        return super().encode(x.sign() * x.abs().sqrt(), fmt)

    def decode(self, encoded: Encoded, fmt: Format) -> torch.Tensor:
        root = super().decode(encoded, fmt)
        return root * root.abs()

    def bound(self, x: torch.Tensor, fmt: Format) -> torch.Tensor:
        root = x.sign() * x.abs().sqrt()
        step = super().bound(root, fmt)
        return step * (2 * root.abs() + step) + 1e-6 * x.abs()


class Wrong(Affine):
    """Base of the wrong ones."""

    name = "wrong"
    facts = CodecFacts(bits=BITS)


def changed(encoded: Encoded, codes: torch.Tensor) -> Encoded:
    return Encoded(codes, encoded.params)


class CodesAboveTheLevels(Wrong):
    def encode(self, x: torch.Tensor, fmt: Format) -> Encoded:
        encoded = super().encode(x, fmt)
        return changed(encoded, encoded.codes + 1)


class WideCodes(Wrong):
    def encode(self, x: torch.Tensor, fmt: Format) -> Encoded:
        encoded = super().encode(x, fmt)
        return changed(encoded, encoded.codes.short())


class WideParams(Wrong):
    """Bytes that no plan counts."""

    def encode(self, x: torch.Tensor, fmt: Format) -> Encoded:
        encoded = super().encode(x, fmt)
        return Encoded(encoded.codes, tuple(param.float() for param in encoded.params))


class LostParams(Wrong):
    def encode(self, x: torch.Tensor, fmt: Format) -> Encoded:
        encoded = super().encode(x, fmt)
        return Encoded(encoded.codes, encoded.params[:0])


class Constant(Wrong):
    """Promises nothing and keeps it."""

    def encode(self, x: torch.Tensor, fmt: Format) -> Encoded:
        encoded = super().encode(x, fmt)
        return changed(encoded, torch.zeros_like(encoded.codes))

    def bound(self, x: torch.Tensor, fmt: Format) -> torch.Tensor:
        return torch.full_like(x, torch.inf)


class Dithered(Wrong):
    """Another rounding each time."""

    def encode(self, x: torch.Tensor, fmt: Format) -> Encoded:
        return super().encode(x * (1 + 0.1 * torch.rand_like(x)), fmt)


class Remembering(Wrong):
    """A range that grows with what has been seen."""

    def __init__(self) -> None:
        self.seen = 0.0

    def encode(self, x: torch.Tensor, fmt: Format) -> Encoded:
        self.seen = max(self.seen, float(x.abs().amax()))
        return super().encode(x * (1 + 1e-3 * self.seen), fmt)


class InPlace(Wrong):
    def encode(self, x: torch.Tensor, fmt: Format) -> Encoded:
        return super().encode(x.mul_(0.5), fmt)


class TensorWide(Wrong):
    """One range for all that arrives together."""

    def fit(self, values, low, high, fmt):
        return super().fit(values, low.amin().expand_as(low), high.amax().expand_as(high), fmt)

    def group_bound(self, low, high, fmt):
        return torch.full_like(low, torch.inf)


class PageWide(Wrong):
    """One range for a page: pages alike, groups not."""

    def fit(self, values, low, high, fmt):
        low, high = (low.amin((-1, -2), True), high.amax((-1, -2), True))
        shape = values.shape[:-1]
        return super().fit(values, low.expand(shape), high.expand(shape), fmt)

    def group_bound(self, low, high, fmt):
        return torch.full_like(low, torch.inf)


class DtypeBound(Wrong):
    """Computes in the dtype it is given."""

    def encode(self, x: torch.Tensor, fmt: Format) -> Encoded:
        return super().encode(x - x.mean(-1, keepdim=True) if x.dtype == torch.float32 else x, fmt)


class HalfDecoded(Wrong):
    def decode(self, encoded: Encoded, fmt: Format) -> torch.Tensor:
        return super().decode(encoded, fmt).half()


class Boastful(Wrong):
    """A hundredth of a step is more than any grid keeps."""

    def group_bound(self, low, high, fmt):
        return super().group_bound(low, high, fmt) / 50


class Shifted(Wrong):
    def decode(self, encoded: Encoded, fmt: Format) -> torch.Tensor:
        return super().decode(encoded, fmt) + 1


class ZeroDivided(Wrong):
    """A constant group's range is nothing to divide by."""

    def decode(self, encoded: Encoded, fmt: Format) -> torch.Tensor:
        value = group(super().decode(encoded, fmt), fmt)
        scale = encoded.params[0].float()[..., None]
        return ungroup(value * (scale / scale), encoded.codes.shape, fmt)


class Overflowing(Wrong):
    """Parameters twice as large as they might be."""

    facts = CodecFacts(form="opaque", bits=BITS)

    def encode(self, x: torch.Tensor, fmt: Format) -> Encoded:
        encoded = super().encode(x, fmt)
        return Encoded(encoded.codes, tuple((2 * param.float()).half() for param in encoded.params))

    def decode(self, encoded: Encoded, fmt: Format) -> torch.Tensor:
        halved = tuple((param.float() / 2).half() for param in encoded.params)
        return super().decode(Encoded(encoded.codes, halved), fmt)


class Swallowing(Wrong):
    def encode(self, x: torch.Tensor, fmt: Format) -> Encoded:
        return super().encode(x.nan_to_num(0, 0, 0), fmt)


class SwallowingInfinity(Wrong):
    def encode(self, x: torch.Tensor, fmt: Format) -> Encoded:
        return super().encode(x.clamp(-6e4, 6e4), fmt)


class RefusingOtherwise(Wrong):
    def encode(self, x: torch.Tensor, fmt: Format) -> Encoded:
        if not bool(x.isfinite().all()):
            raise ZeroDivisionError
        return super().encode(x, fmt)


class FalselyAffine(Rooted):
    """Says that kernels may read it."""

    name = "wrong"
    facts = CodecFacts(bits=BITS)


class FalselyPointed(Lloyd):
    """Says that kernels may look its points up."""

    name = "wrong"
    facts = codec_facts("lloyd")

    def decode(self, encoded: Encoded, fmt: Format) -> torch.Tensor:
        return super().decode(encoded, fmt) * 1.01


class Nameless(Wrong):
    name = ""


class Outsized(Wrong):
    facts = CodecFacts(bits=(2, 7))


class Formless(Wrong):
    facts = CodecFacts(symmetric=False, asymmetric=False)


class Overfull(Wrong):
    facts = CodecFacts("codebook", bits=(2, 5))


class Pointless(Wrong):
    facts = CodecFacts("codebook", bits=(1, 2), codebooks=((-1.0, 1.0), (-1.0, 0.0, 1.0)))
