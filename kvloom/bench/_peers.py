"""Dense attention that packed attention is compared with: torch's kernels, FlashAttention-3, FlashInfer."""

from __future__ import annotations

import importlib
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

Attend = Callable[[], torch.Tensor]


class Peer(ABC):
    """A dense decode attention."""

    name: str

    def lack(self, dtype: torch.dtype) -> str | None:
        """Why it cannot be used here with ``dtype``, or None."""
        return None

    @abstractmethod
    def prepare(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> Attend:
        """Bring a cache into the peer's own layout.

        Args:
            query: ``[batch, query_heads, 1, head_dim]``.
            key: ``[batch, kv_heads, tokens, head_dim]``.
            value: The same shape.
            scaling: Factor of the scores.

        Returns:
            A launch; its result views as ``[batch, query_heads, head_dim]``.
        """


class Sdpa(Peer):
    """torch's `scaled_dot_product_attention`.

    Args:
        kind: Its kernel; None lets torch choose.
        grouped: Give the query heads of a KV head as that head's queries: the same result, other kernels.
    """

    def __init__(self, kind: SDPBackend | None, grouped: bool) -> None:
        short = {SDPBackend.FLASH_ATTENTION: "-flash", SDPBackend.CUDNN_ATTENTION: "-cudnn", None: ""}
        self.name = f"sdpa{short[kind]}{'-grouped' if grouped else ''}"
        self._kind, self._grouped = kind, grouped

    def prepare(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> Attend:
        """See `Peer.prepare`."""
        rows = query.view(len(key), key.shape[1], -1, query.shape[-1]) if self._grouped else query

        def launch() -> torch.Tensor:
            gqa = not self._grouped
            out: torch.Tensor = scaled_dot_product_attention(rows, key, value, scale=scaling, enable_gqa=gqa)
            return out

        return launch if self._kind is None else _with_kernel(self._kind, launch)


class FlashAttention3(Peer):
    """FlashAttention-3's decode entry, which splits the tokens by itself; built from source, or the fa3-fwd wheel."""

    name = "fa3"
    MODULES = ("flash_attn_interface", "fa3_fwd_interface")

    def lack(self, dtype: torch.dtype) -> str | None:
        """See `Peer.lack`."""
        return "takes bfloat16 only" if dtype != torch.bfloat16 else _import_lack(self._module())

    def prepare(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> Attend:
        """See `Peer.prepare`."""
        attend: Any = importlib.import_module(self._module()).flash_attn_with_kvcache
        rows, keys, values = (x.transpose(1, 2).contiguous() for x in (query, key, value))

        def launch() -> torch.Tensor:
            out = attend(rows, keys, values, softmax_scale=scaling)
            only: torch.Tensor = out[0] if isinstance(out, tuple) else out
            return only

        return launch

    def _module(self) -> str:
        return next((name for name in self.MODULES if importlib.util.find_spec(name)), self.MODULES[0])


class FlashInfer(Peer):
    """FlashInfer's batched decode over pages of its own, in order.

    Args:
        tensor_cores: Which of its two kernels.
    """

    PAGE_TOKENS = 64
    WORKSPACE_BYTES = 256 << 20

    def __init__(self, tensor_cores: bool) -> None:
        self.name = "flashinfer-tensor-cores" if tensor_cores else "flashinfer"
        self._tensor_cores = tensor_cores
        self._planned: tuple[object, Any] | None = None

    def lack(self, dtype: torch.dtype) -> str | None:
        """See `Peer.lack`."""
        return _import_lack("flashinfer")

    def prepare(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> Attend:
        """See `Peer.prepare`."""
        wrapper = self._plan(query, key, scaling)
        pages = (_in_pages(key, self.PAGE_TOKENS), _in_pages(value, self.PAGE_TOKENS))
        rows = query.squeeze(2)

        def launch() -> torch.Tensor:
            out: torch.Tensor = wrapper.run(rows, pages)
            return out

        return launch

    def _plan(self, query: torch.Tensor, key: torch.Tensor, scaling: float) -> Any:
        """The wrapper planned for a shape, one for all caches of that shape."""
        case = (query.shape, key.shape, query.dtype, scaling)
        if self._planned is None or self._planned[0] != case:
            self._planned = (case, self._planned_for(query, key, scaling))
        return self._planned[1]

    def _planned_for(self, query: torch.Tensor, key: torch.Tensor, scaling: float) -> Any:
        batch, kv_heads, tokens, dim = key.shape
        pages = tokens // self.PAGE_TOKENS
        workspace = torch.empty(self.WORKSPACE_BYTES, dtype=torch.uint8, device=key.device)
        wrapper: Any = importlib.import_module("flashinfer").BatchDecodeWithPagedKVCacheWrapper(
            workspace, "HND", use_tensor_cores=self._tensor_cores
        )
        order = torch.arange(batch * pages + 1, dtype=torch.int32, device=key.device)
        wrapper.plan(
            order[::pages].contiguous(),
            order[:-1],
            torch.full((batch,), self.PAGE_TOKENS, dtype=torch.int32, device=key.device),
            query.shape[1],
            kv_heads,
            dim,
            self.PAGE_TOKENS,
            sm_scale=scaling,
            q_data_type=query.dtype,
            kv_data_type=key.dtype,
        )
        return wrapper


def peers(device: torch.device) -> list[Peer]:
    """The peers of a kind of device."""
    if device.type == "cpu":
        return [Sdpa(None, grouped) for grouped in (False, True)]
    kinds = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)
    torchs = [Sdpa(kind, grouped) for kind in kinds for grouped in (False, True)]
    return [*torchs, FlashAttention3(), FlashInfer(tensor_cores=False), FlashInfer(tensor_cores=True)]


def _with_kernel(kind: SDPBackend, launch: Attend) -> Attend:
    def within() -> torch.Tensor:
        with sdpa_kernel(kind):
            return launch()

    return within


def _in_pages(x: torch.Tensor, page_tokens: int) -> torch.Tensor:
    """``[batch, heads, tokens, dim]`` to ``[batch * pages, heads, page_tokens, dim]``."""
    pages: torch.Tensor = x.unflatten(2, (-1, page_tokens)).transpose(1, 2)
    return pages.flatten(0, 1).contiguous()


def _import_lack(module: str) -> str | None:
    if importlib.util.find_spec(module) is None:
        return "not installed"
    try:
        importlib.import_module(module)
    except Exception as error:  # other people's extension modules fail in every way
        return f"does not import: {first_line(error)}"
    return None


def first_line(error: Exception) -> str:
    """The first line of an error, or its type if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
