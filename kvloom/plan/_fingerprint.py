"""What a plan must know of the model it was made for, and the check that it is the same one."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, WithJsonSchema, field_serializer, field_validator, model_validator

from kvloom._dtypes import dtype_name
from kvloom.errors import ModelError
from kvloom.plan._spec import PlanModel, format_layers, parse_layers
from kvloom.plan._validate import validated

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_LAYERS_SCHEMA = {
    "anyOf": [{"type": "integer"}, {"type": "string"}, {"type": "array", "items": {"type": "integer"}, "minItems": 1}]
}
"""Of ``packed_layers`` as files have them."""


class Fingerprint(PlanModel):
    """Shape of a model's cache.

    Attributes:
        architecture: Class name in the model's config, e.g. ``LlamaForCausalLM``.
        num_layers: Decoder layers.
        packed_layers: Full-attention layers, the ones a plan covers; sliding-window, linear and shared layers keep
            transformers' own cache layers.
        num_kv_heads: Key/value heads of a packed layer.
        head_dim: Channels of a head.
        dtype: Compute dtype the model had when the plan was made: the default of byte counts, not a condition.
    """

    architecture: str
    num_layers: int = Field(gt=0)
    packed_layers: Annotated[tuple[int, ...], WithJsonSchema(_LAYERS_SCHEMA)] = Field(min_length=1)
    num_kv_heads: int = Field(gt=0, le=2**12)
    head_dim: int = Field(gt=0)
    dtype: str = "bfloat16"

    @field_validator("packed_layers", mode="before")
    @classmethod
    def _packed_layers_parse(cls, layers: Any) -> Any:
        return parse_layers(layers) if isinstance(layers, str | int) else layers

    @field_validator("dtype")
    @classmethod
    def _dtype_is_known(cls, dtype: str) -> str:
        return dtype_name(dtype)

    @model_validator(mode="after")
    def _layers_are_the_models(self) -> Fingerprint:
        layers = self.packed_layers
        if any(low >= high for low, high in pairwise((-1, *layers, self.num_layers))):
            raise ValueError(
                f"packed_layers are {format_layers(list(layers))}: name rising indices from 0 to num_layers - 1 = "
                f"{self.num_layers - 1}"
            )
        return self

    @field_serializer("packed_layers")
    def _packed_layers_text(self, layers: tuple[int, ...]) -> int | str:
        return format_layers(list(layers))

    @classmethod
    def of(cls, model: Any) -> Fingerprint:
        """Fingerprint of a transformers model or config.

        Raises:
            ModelError: The model does arithmetic on cached keys (MLA) or caches an image's (Mllama), has no
                full-attention layer, or its layers differ in KV heads or head_dim.
            PlanError: It computes in a dtype that caches are not kept in.
        """
        config = getattr(model, "config", model)
        text = config.get_text_config(decoder=True)
        _refuse_latent(text)
        _refuse_cross_attention(text)
        packed = full_attention_layers(text)
        shapes = {_shape(text, layer) for layer in packed}
        if len(shapes) != 1:
            raise ModelError(
                f"{_architecture(config)} has full-attention layers of several (KV heads, head_dim): {sorted(shapes)}; "
                "kvloom packs models whose full-attention layers share one shape."
            )
        heads, dim = shapes.pop()
        shape = {
            "architecture": _architecture(config),
            "num_layers": text.num_hidden_layers,
            "packed_layers": tuple(packed),
            "num_kv_heads": heads,
            "head_dim": dim,
            "dtype": _dtype_name(getattr(model, "dtype", None) or getattr(config, "dtype", None)),
        }
        return validated(cls, shape, _architecture(config))

    @classmethod
    def of_any(cls, model: Any) -> Fingerprint:
        """``model`` itself if it is a fingerprint, else `of` it."""
        return model if isinstance(model, Fingerprint) else cls.of(model)

    def check(self, other: Fingerprint) -> None:
        """Raise ModelError, naming the first field that differs, unless ``other`` is the same model (dtype aside)."""
        for name in ("architecture", "num_layers", "packed_layers", "num_kv_heads", "head_dim"):
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs:
                raise ModelError(
                    f"the plan is for {name} = {_short(ours)} and this model has {_short(theirs)}; "
                    "make a plan for this model (kvloom profile, kvloom plan)."
                )

    def local_heads(self, rank: int, world_size: int) -> range:
        """KV heads of a rank where they are split evenly: ``[rank * H / world_size, (rank + 1) * H / world_size)``.

        Raises:
            ModelError: There is no such rank, or the heads cannot be split evenly.
        """
        if not 0 <= rank < world_size:
            raise ModelError(f"there is no rank {rank} of {world_size}: ranks count from 0.")
        if self.num_kv_heads % world_size:
            raise ModelError(
                f"the {self.num_kv_heads} KV heads of {self.architecture} cannot be split evenly over {world_size} "
                f"processes: start a number of them that divides {self.num_kv_heads}."
            )
        count = self.num_kv_heads // world_size
        return range(rank * count, (rank + 1) * count)

    def shard(self, rank: int, world_size: int) -> Fingerprint:
        """Shape of the cache of one rank; see `local_heads`."""
        return self.model_copy(update={"num_kv_heads": len(self.local_heads(rank, world_size))})


def full_attention_layers(text_config: PreTrainedConfig) -> list[int]:
    """Indices of the layers whose stock cache layer is transformers' plain growing one."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    layers = DynamicCache(config=text_config).layers
    packed = [i for i, layer in enumerate(layers) if type(layer) is DynamicLayer]
    if not packed:
        raise ModelError(
            f"{_architecture(text_config)} has no full-attention layer whose cache is keys and values alone, so there "
            "is nothing to pack."
        )
    return packed


def _refuse_cross_attention(text: Any) -> None:
    if getattr(text, "cross_attention_layers", None):
        raise ModelError(
            f"{_architecture(text)} keeps keys and values of images in layers of its cache and looks into them "
            "(cross_attention_layers in its config), so kvloom cannot hand it packed ones; use its own cache."
        )


def _refuse_latent(text: Any) -> None:
    if getattr(text, "kv_lora_rank", None):
        raise ModelError(
            f"{_architecture(text)} caches a latent and does arithmetic on it after the cache (multi-head latent "
            "attention, kv_lora_rank in its config), so kvloom cannot hand it packed keys; use its own cache."
        )


def _shape(text: Any, layer: int) -> tuple[int, int]:
    per_layer = getattr(text, "per_layer_config", None)
    config = per_layer[layer] if per_layer is not None else text
    heads = config.num_attention_heads
    kv_heads = _kv_heads(config, heads)
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return int(kv_heads), int(dim)


def _kv_heads(config: Any, heads: int) -> int:
    """KV heads as they are cached, also Falcon's: its new decoder repeats them for every query head first."""
    if getattr(config, "new_decoder_architecture", False):
        return heads
    if getattr(config, "multi_query", False):
        return 1
    for name in ("num_key_value_heads", "num_kv_heads"):
        value = getattr(config, name, None)
        if value:
            return int(value)
    return heads


def _architecture(config: Any) -> str:
    names = getattr(config, "architectures", None)
    return str(names[0]) if names else type(config).__name__


def _dtype_name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.") if dtype is not None else "bfloat16"


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
