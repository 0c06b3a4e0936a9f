"""vLLM serves a plan: a packed paged cache whose layers differ, and batching, prefix sharing and preemption by vLLM.

``kv_plan.json`` lies beside the model's ``config.json``::

    vllm serve MODEL --quantization kvloom

or anywhere else, also for a model of the hub::

    vllm serve MODEL --hf-overrides '{"quantization_config": {"quant_method": "kvloom", "plan": "kv_plan.json"}}'

vLLM finds `register` by its entry point ``vllm.general_plugins``; nothing of vLLM is patched, and models served without
a plan are not touched. (Weights that are quantised take the same slot of vLLM, so their checkpoints are refused.)

**Blocks are pages.** A block of vLLM is one page of every layer: the records of `kvloom.pages`, in each layer as many
bytes as its entry says. The cache has the memory that vLLM gives it divided by `block_nbytes` blocks.

**The exact tail lies in blocks, too.** The tokens of a page that is not full are exact, as in `kvloom.LoomCache`, and
take more bytes than a block of packed ones. A sequence therefore owns some blocks more than its tokens need
(`spare_blocks`): its exact tokens start in the block that will hold their page and go on in those that follow. When
the page is full it is packed over their first bytes, and the next page's exact tokens start one block later. All bytes
are thus counted and given out by vLLM, and a sequence finds everything it has by its block table: requests that are
preempted or aborted leave nothing behind, those that resume start from blocks of their own, and prefixes are shared in
whole blocks, which hold nothing but full pages.

**Sinks** lie, exact, in the first block of a sequence, and page ``p`` then in block ``p + 1``, since it is full some
tokens after block ``p``. A shared prefix of ``n`` blocks so ends at the last page that is full within it, which is up to
63 tokens earlier (page boundaries lie ``sinks`` tokens after those of blocks); vLLM copies the last block, and the
request computes those tokens again. Other requests find a prefix one step after it was computed.

**Prefill.** The tokens that vLLM gives to one pass read each other as the plan's ``prefill`` says, and earlier ones as
stored. With ``"exact"`` a prompt that is cut by chunked prefill, or begins with a shared prefix, therefore reads what came
before packed, where a whole one reads it exactly; with ``"quantized"`` results do not depend on it, but for the rounding of
the model's own sums.

**Refused at start-up**, in one sentence: plans that evict, keep a window of recent tokens, pack keys before RoPE, or have
layers of different page sizes or sinks; models with other than full-attention layers, whose blocks vLLM would pad to the
widest; tensor and context parallelism, speculative decoding, KV transfer.

Sequences are read one after the other by the kernels of `kvloom.kernels`: on a CPU that is what is tested here. Kernels
that read a batch through vLLM's block table on a GPU are not connected yet.
"""

from __future__ import annotations

from kvloom._extras import require
from kvloom.integrations.vllm._layout import block_layouts, block_nbytes, spare_blocks

__all__ = ["block_layouts", "block_nbytes", "register", "spare_blocks"]


def register() -> None:
    """Make ``--quantization kvloom`` known to vLLM, which calls this in each of its processes.

    Raises:
        MissingExtraError: vLLM is not installed.
    """
    require("vllm", "kvloom.integrations.vllm")
    from kvloom.integrations.vllm import _config, _spec

    _spec.register()
    _config.register()
