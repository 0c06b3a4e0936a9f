"""Made-up profiles: losses fall by about four a bit, layers differ by orders of magnitude."""

from __future__ import annotations

import random
from collections.abc import Sequence

from kvloom.plan import Fingerprint, TensorSpec
from kvloom.signals import Calibration, GradientNorms, LossTable, Profile


def channel(bits: int, group: int = 64) -> TensorSpec:
    return TensorSpec(bits=bits, grouping="per_channel", group_size=group)


def token(bits: int, group: int | str = "head_dim") -> TensorSpec:
    return TensorSpec(bits=bits, grouping="per_token", group_size=group)


KEYS = tuple(channel(b) for b in (1, 2, 3, 4, 5, 6, 8)) + tuple(channel(b, 32) for b in (2, 3, 4, 5))
KEYS += (channel(16),)
VALUES = tuple(token(b) for b in (1, 2, 3, 4, 5, 6, 8)) + tuple(token(b, 32) for b in (2, 3, 4, 5))
VALUES += (token(16),)


def fingerprint(layers: int, heads: int = 3, dim: int = 64, dtype: str = "float16") -> Fingerprint:
    return Fingerprint(
        architecture="LlamaForCausalLM",
        num_layers=layers,
        packed_layers=tuple(range(layers)),
        num_kv_heads=heads,
        head_dim=dim,
        dtype=dtype,
    )


def profile(
    layers: int = 4,
    seed: int = 0,
    keys: Sequence[TensorSpec] = KEYS,
    values: Sequence[TensorSpec] = VALUES,
    **shape: int | str,
) -> Profile:
    rng = random.Random(seed)
    model = fingerprint(layers, **shape)

    def norms() -> list[float]:
        return [rng.lognormvariate(0, 1) for _ in range(layers)]

    def losses(specs: Sequence[TensorSpec]) -> list[list[float]]:
        return [[_loss(rng, weight, spec) for spec in specs] for weight in norms()]

    def zeros(specs: Sequence[TensorSpec]) -> list[list[float]]:
        return [[0.0] * len(specs) for _ in range(layers)]

    return Profile(
        model=model,
        gradient=GradientNorms(key=norms(), value=norms(), key_spread=norms(), value_spread=norms()),
        table=LossTable(
            model=model,
            layers=list(model.packed_layers),
            key_specs=list(keys),
            value_specs=list(values),
            key_loss=losses(keys),
            value_loss=losses(values),
            key_spread=zeros(keys),
            value_spread=zeros(values),
        ),
        calibration=Calibration(sha256="0a" * 32, texts=["worked.txt"], prompts=2, tokens=512, seed=7),
        seconds=1.5,
    )


def _loss(rng: random.Random, weight: float, spec: TensorSpec) -> float:
    if spec.bits == 16:
        return 0.0
    finer = 0.7 if spec.group_size == 32 else 1.0
    return weight * finer * 4.0**-spec.bits * rng.uniform(0.8, 1.25)
