"""The door: vLLM's quantisation method ``kvloom`` reads a plan, refuses what cannot be served, and equips layers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from vllm import envs
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import (
    QUANTIZATION_METHODS,
    QuantizationConfig,
    get_quantization_config,
    register_quantization_config,
)
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.transformers_utils.repo_utils import get_hf_file_to_dict
from vllm.v1.attention.backend import AttentionType

from kvloom import codecs, kernels
from kvloom.errors import ModelError, PlanError
from kvloom.integrations.vllm._backend import KvloomImpl, backend_of, varlen_of
from kvloom.integrations.vllm._layout import BlockLayout, block_layouts, part_of, spare_blocks
from kvloom.pages import Role
from kvloom.plan import Fingerprint, Plan


class KvloomConfig(QuantizationConfig):  # type: ignore[misc]
    """A plan as vLLM's quantisation configuration: the cache is packed, weights are served as their checkpoint says.

    Args:
        path: The plan's file.

    Attributes:
        plan: Read by `maybe_update_config`.
        weights: vLLM's configuration of the checkpoint's quantised weights, whose place this one takes; None if they
            are not quantised.

    Raises:
        PlanError: There is none.
    """

    plan: Plan
    weights: QuantizationConfig | None = None

    def __init__(self, path: str | None = None) -> None:
        super().__init__()
        if path is None:
            raise PlanError(
                """quantization kvloom has no plan: name its file by --hf-overrides '{"quantization_config": """
                """{"quant_method": "kvloom", "plan": "kv_plan.json"}}'."""
            )
        self.path = path

    def get_name(self) -> str:
        """What ``--quantization`` calls it."""
        return "kvloom"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Compute dtypes."""
        return [torch.float16, torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """The oldest GPU, as vLLM writes it."""
        return 70

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: vLLM takes every safetensors file of a model's folder for weights, so plans are kept elsewhere."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> KvloomConfig:
        """From ``quantization_config`` of the model's config or of ``--hf-overrides``.

        Raises:
            PlanError: It says something else than a plan's file.
        """
        for name in sorted(config.keys() - {"quant_method", "plan"}):
            raise PlanError(f"quantization_config.{name}: kvloom takes a plan and nothing else, so leave it out.")
        path = config.get("plan")
        if path is not None and not isinstance(path, str):
            raise PlanError(f"quantization_config.plan = {path!r}: give the path of a plan's file.")
        return cls(path)

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Read the plan and compare it with the model; read how the checkpoint quantises its weights.

        Raises:
            PlanError: The plan cannot be read, or not be served.
            ModelError: It is another model's, or the model cannot be served.
        """
        self.weights = weights_config(model_name, hf_config, revision)
        plan = Plan.load(self.path)
        model = Fingerprint.of(hf_config)
        plan.model.check(model)
        if len(model.packed_layers) < model.num_layers:
            raise ModelError(
                f"{len(model.packed_layers)} of the {model.num_layers} layers of {model.architecture} have full "
                "attention, and vLLM pads the blocks of such a model to its widest layer, which saves nothing: use "
                "transformers with kvloom.LoomCache."
            )
        block_layouts(plan, model.dtype)
        for name in plan.codecs:
            codecs.get(name).prepare()
        plan.rotations()  # read now: the plan travels to processes that may not see its files
        self.plan = plan

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """What makes a layer's weights: what the checkpoint says. Attention layers get the backend of their entry.

        Raises:
            ModelError: The engine is asked for something that packed blocks do not go with.
            PlanError: A rank cannot hold its part of the plan.
        """
        layouts = self._layouts  # asked of the first layer, whatever it is, before vLLM splits any heads
        if isinstance(layer, Attention):
            if not isinstance(layer.impl, KvloomImpl):
                self._serve(layer, extract_layer_index(prefix), layouts)
            return None
        if self.weights is not None:
            return self.weights.get_quant_method(layer, prefix)
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None

    @property
    def packed_modules_mapping(self) -> dict[str, list[str]]:
        """Layers that vLLM makes one of, which it tells those that quantise weights."""
        return self._packed_modules if self.weights is None else self.weights.packed_modules_mapping

    @packed_modules_mapping.setter
    def packed_modules_mapping(self, mapping: dict[str, list[str]]) -> None:
        self._packed_modules = mapping
        if self.weights is not None:
            self.weights.packed_modules_mapping = mapping

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Tell those that quantise weights how vLLM names them."""
        if self.weights is not None:
            self.weights.apply_vllm_mapper(hf_to_vllm_mapper)

    def get_cache_scale_mapper(self) -> Any:
        """Names of the checkpoint's cache scales, which its own method knows."""
        return (self.weights or QuantizationConfig).get_cache_scale_mapper()

    def _serve(self, layer: Attention, index: int, layouts: Mapping[int, BlockLayout]) -> None:
        _refuse_attention(layer, index)
        _refuse_shape(layer, index, layouts[index])
        layer.attn_backend = backend_of(index, layouts[index], spare_blocks(layouts))
        layer.impl = KvloomImpl(
            layouts[index],
            self.plan.prefill,
            self._matrices.get(index, {}),
            num_heads=layer.num_heads,
            scale=layer.impl.scale,
            softcap=layer.impl.logits_soft_cap or None,
            sink_logits=getattr(layer.impl, "sinks", None),
            varlen=varlen_of(layer.impl),
        )
        _build(layer.impl, get_current_vllm_config())

    @cached_property
    def _layouts(self) -> dict[int, BlockLayout]:
        """Those of this process's rank."""
        config = get_current_vllm_config()
        dtype = config.model_config.dtype
        layouts = block_layouts(self.plan, dtype, *_rank())
        _refuse_engine(config, next(iter(layouts.values())).page_tokens)
        if self.weights is not None and dtype not in self.weights.get_supported_act_dtypes():
            raise ModelError(
                f"weights quantised by {self.weights.get_name()} do not go with {dtype}: choose another --dtype."
            )
        return layouts

    @cached_property
    def _matrices(self) -> dict[int, dict[Role, torch.Tensor]]:
        return part_of(self.plan, *_rank()).rotations()


def weights_config(model_name: str, hf_config: Any, revision: str | None) -> QuantizationConfig | None:
    """How vLLM itself would serve a checkpoint's quantised weights; None if they are not quantised.

    Raises:
        ModelError: vLLM does not know the method, or not on this device.
    """
    own = _weights_fields(model_name, revision)
    if own is None:
        return None
    methods = {name: get_quantization_config(name) for name in QUANTIZATION_METHODS if name != "kvloom"}
    found = (it.override_quantization_method(own, None, hf_config=hf_config) for it in methods.values())
    name = next((it for it in found if it), None) or own.get("quant_method")
    if name not in methods:
        raise ModelError(f"the weights of {model_name} are quantised by {name!r}, which vLLM does not know.")
    current_platform.verify_quantization(name)
    made = methods[name].from_config(own)
    capability = current_platform.get_device_capability()
    if capability is not None and capability.to_int() < made.get_min_capability():
        raise ModelError(f"the weights of {model_name} are quantised by {name}, and this device is too old for that.")
    made.maybe_update_config(model_name, hf_config=hf_config, revision=revision)
    return made


def _weights_fields(model_name: str, revision: str | None) -> dict[str, Any] | None:
    """What a checkpoint's files say of its quantised weights; in vLLM's config the plan's name stands there."""
    config = get_hf_file_to_dict("config.json", model_name, revision) or {}
    text, name = config.get("text_config") or {}, "quantization_config"
    for own in (config.get(name), text.get(name), config.get("compression_config")):
        if own and own.get("quant_method") != "kvloom":  # a config may name a plan, too
            return dict(own)
    own = get_hf_file_to_dict("hf_quant_config.json", model_name, revision)
    return own and dict(own)


def _build(impl: KvloomImpl, config: VllmConfig) -> None:
    """Have a layer's kernels before a request waits for them."""
    layout = impl.layout
    reach = kernels.Reach(
        group=impl.num_heads // impl.num_kv_heads,
        sequences=config.scheduler_config.max_num_seqs,
        pages=layout.full_pages(config.model_config.max_model_len),
        sinks=layout.sinks,
        is_capped=impl.is_capped,
    )
    backend = kernels.backend(torch.device(current_platform.device_type))
    backend.build_pooled(layout.layouts, config.model_config.dtype, reach)


def _rank() -> tuple[int, int]:
    """Which of the processes that share the KV heads this is, and how many those are."""
    return get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()


def _refuse_engine(config: VllmConfig, page_tokens: int) -> None:
    parallel, cache = config.parallel_config, config.cache_config
    refused = {
        "--decode-context-parallel-size": parallel.decode_context_parallel_size > 1,
        "--prefill-context-parallel-size": parallel.prefill_context_parallel_size > 1,
        "--speculative-config": config.speculative_config is not None,
        "--kv-transfer-config or --kv-offloading-size": config.kv_transfer_config is not None,
        "--kv-cache-dtype": cache.cache_dtype != "auto",
        "--block-size": cache.user_specified_block_size and cache.block_size != page_tokens,
        "VLLM_BATCH_INVARIANT": envs.VLLM_BATCH_INVARIANT,
    }
    for option, is_asked in refused.items():
        if is_asked:
            raise ModelError(
                f"{option} does not go with quantization kvloom, whose plan decides what a block of "
                f"{page_tokens} tokens holds: leave it out."
            )


def _refuse_attention(layer: Attention, index: int) -> None:
    refused = {
        "a sliding window": layer.sliding_window is not None,
        "ALiBi": layer.impl.alibi_slopes is not None,
        "the cache of another layer": layer.kv_sharing_target_layer_name is not None,
        "attention that is not causal": layer.attn_type != AttentionType.DECODER,
        "tokens of an image that read each other": layer.use_mm_prefix,
        f"an attention of its own ({type(layer).__name__})": type(layer) is not Attention,
    }
    for kind, is_so in refused.items():
        if is_so:
            raise ModelError(
                f"layer {index} has {kind}, which packed blocks do not go with: use transformers with kvloom.LoomCache."
            )


def _refuse_shape(layer: Attention, index: int, layout: BlockLayout) -> None:
    """Models whose states vLLM and transformers cache in different shapes, as those of Falcon's new decoder."""
    asked = layer.num_kv_heads, layer.head_size, layer.head_size_v
    held = layout.kv_heads, layout.head_dim, layout.head_dim
    if asked != held:
        raise ModelError(
            f"vLLM caches layer {index} as (KV heads, channels of keys, of values) = {asked}, and the plan, made of "
            f"transformers' model, has {held}: use transformers with kvloom.LoomCache."
        )


def register() -> None:
    """Make the method known to vLLM."""
    register_quantization_config("kvloom")(KvloomConfig)
