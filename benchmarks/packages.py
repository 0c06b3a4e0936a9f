"""Public packages whose caches take the place of transformers' own, as contestants.

    pip install --no-deps tiny-turboquant==0.18.0 turboquant==0.2.0 nexusquant-kv==0.6.3 kakeyalattice==1.5.0
    pip install scipy zstandard

Codes, grids and the order of things are the packages' own. What is set here is what they offer: bits, groups and, where
there is one, the newest tokens that stay exact: 128 as they come, which costs 0.8 to 1 bit at 2,055 tokens, or none. A
package that is not installed or does not work here is left out with a sentence.

True bits of tiny-turboquant are counted on its tensors. The others hold floats, or codes of a byte each, and state what
a packed cache would take: their figure counts, with norms and scales at 16 bits as everywhere, and with exact tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np
import torch

from kvloom.evaluate import Contestant, Peers
from kvloom.plan import Fingerprint

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

WINDOW = 128
"""Newest tokens that tiny-turboquant and turboquant keep exactly as they come."""


def package_contestants(model: PreTrainedModel) -> Peers:
    """Every package that works on this machine, in settings of about 2 to 4 true bits."""
    contestants: list[Contestant] = []
    notes: list[str] = []
    for name, settings in PACKAGES.items():
        try:
            found = list(settings(model))
            _try(found[0], model)
        except (ImportError, AttributeError, RuntimeError, TypeError, ValueError) as error:
            reason = str(error).strip().split("\n")[0].rstrip(".")
            notes.append(f"{name} is left out: it does not work here ({type(error).__name__}: {reason}).")
        else:
            contestants += found
    return Peers(tuple(contestants), tuple(notes))


def _try(contestant: Contestant, model: PreTrainedModel) -> None:
    """Two updates of a small cache: what a package cannot do here shows before hours of scoring."""
    shape = Fingerprint.of(model)
    states = torch.ones(1, shape.num_kv_heads, 2 * WINDOW, shape.head_dim, dtype=model.dtype, device=model.device)
    cache = contestant.make_cache()
    for _ in range(2):
        cache.update(states, states, 0)


def tiny_turboquant(model: PreTrainedModel) -> Iterator[Contestant]:
    """Keys per channel of 128 tokens, values per token, min/max: KIVI's scheme, with packed codes.

    Its presets (the one of K3V2 has values in groups of 32), and 2 bits.
    """
    cache = import_module("tiny_turboquant").TinyKVCache
    plain, exact = ((2, 2), (3, 2), (3, 3), (4, 3), (4, 4)), ((2, 2), (3, 2), (3, 3))
    windows = [(*bits, None, window) for window, pairs in ((0, plain), (WINDOW, exact)) for bits in pairs]
    for key, value, group, window in [*windows, (3, 2, 32, 0)]:
        options = {"key_bits": key, "value_bits": value, "value_group_size": group, "residual_len": window}
        yield Contestant(
            name=_named("tiny-turboquant", key, value, window) + (f", groups of {group}" if group else ""),
            method="tiny-turboquant",
            target_bits=None,
            make_cache=lambda options=options: cache.for_model(model, **options),
            settings=_settings("tiny-turboquant", **options),
            within_pass="chunk-exact" if window else "quantized",
        )


def turboquant(model: PreTrainedModel) -> Iterator[Contestant]:
    """A random rotation and one grid for all coordinates of unit vectors (TurboQuant, arXiv 2504.19874, algorithm 1).

    Its codebooks call ``numpy.trapz``, which numpy 2 calls ``trapezoid``: they are made beforehand under that name.
    Codes lie in a byte each and the dequantised cache is kept beside them: counted are codes at their width and norms.
    """
    module = import_module("turboquant.cache")
    dim = Fingerprint.of(model).head_dim
    for bits, window in ((2, 0), (3, 0), (4, 0), (2, WINDOW), (3, WINDOW)):
        with patch.object(np, "trapz", np.trapezoid, create=True):
            module._get_quantizer(dim, bits, str(model.device))

        def make(bits: int = bits, window: int = window) -> Cache:
            cache = module.TurboQuantCache(bits=bits)
            layers = range(model.config.num_hidden_layers)
            cache.layers = [module.TurboQuantLayer(bits=bits, residual_len=window) for _ in layers]
            return cache

        yield Contestant(
            name=_named("turboquant", bits, bits, window),
            method="turboquant",
            target_bits=None,
            make_cache=make,
            settings=_settings("turboquant", stated=True, bits=bits, residual_len=window),
            within_pass="chunk-exact" if window else "quantized",
            stated_bits=_stated(bits + 16 / dim, window),
        )


def nexusquant(model: PreTrainedModel) -> Iterator[Contestant]:
    """Keys before RoPE and values, turned by a Hadamard matrix, to points of the E8 lattice, one scale a vector.

    States are stored as floats; its README counts the bits and 16 for the scale of a vector.
    """
    cache = import_module("nexusquant.integrations.quantized_cache").E8QuantizedCache
    dim = Fingerprint.of(model).head_dim
    for key, value in ((2, 2), (3, 2), (3, 3), (4, 3), (4, 4)):
        yield Contestant(
            name=_named("nexusquant-kv", key, value),
            method="nexusquant-kv",
            target_bits=None,
            make_cache=lambda key=key, value=value: cache.from_model(model, key_bits=key, value_bits=value),
            settings=_settings("nexusquant-kv", stated=True, key_bits=key, value_bits=value),
            within_pass="quantized",
            stated_bits=_stated((key + value) / 2 + 16 / dim),
        )


def kakeyalattice(model: PreTrainedModel) -> Iterator[Contestant]:
    """Unit vectors, turned by a Hadamard matrix, to points of the D4 or the E8 lattice, with two scales a vector.

    States are stored as floats; the bits are the codec's own figure.
    """
    cache = import_module("kakeyalattice.hf").KakeyaLatticeCache
    shape = Fingerprint.of(model)
    options: dict[str, Any] = {"num_hidden_layers": shape.num_layers, "head_dim": shape.head_dim}
    for variant, reach in (("d4", 1), ("e8", 1), ("d4", 2), ("d4", 3), ("e8", 6), ("d4", 7)):
        own = {"variant": variant, "q_range": reach}

        def make(own: dict[str, Any] = own) -> Any:
            return cache(**own, **options, device=model.device)

        yield Contestant(
            name=f"kakeyalattice {variant.upper()} q{reach}",
            method="kakeyalattice",
            target_bits=None,
            make_cache=make,
            settings=_settings("kakeyalattice", stated=True, **own),
            within_pass="quantized",
            stated_bits=_stated(make()._codecs[0].bits_per_token_per_head / shape.head_dim),
        )


PACKAGES: dict[str, Callable[[PreTrainedModel], Iterator[Contestant]]] = {
    "tiny-turboquant": tiny_turboquant,
    "turboquant": turboquant,
    "nexusquant-kv": nexusquant,
    "kakeyalattice": kakeyalattice,
}
"""Name on the package index -> its settings."""


def _named(package: str, key: int, value: int, window: int = 0) -> str:
    return f"{package} K{key}V{value}" + (f", newest {window} exact" if window else "")


def _settings(package: str, **options: object) -> dict[str, object]:
    return {"package": package, "version": version(package), **options}


def _stated(bits: float, window: int = 0) -> Callable[[Cache], float]:
    """True bits where `bits` an element are stored of all tokens but the newest `window`."""

    def of(cache: Cache) -> float:
        tokens = cache.get_seq_length()
        exact = min(tokens, window)
        return (bits * (tokens - exact) + 16 * exact) / tokens

    return of
