"""vLLM serves a plan: a packed paged cache whose layers differ, and batching, prefix sharing and preemption by vLLM.

    vllm serve MODEL --hf-overrides '{"quantization_config": {"quant_method": "kvloom", "plan": "kv_plan.json"}}'

vLLM finds `register` by its entry point ``vllm.general_plugins``; nothing of vLLM is patched, and models served without
a plan are not touched. Weights are served as their checkpoint says: quantised ones by the method of vLLM's that it
names, whose slot the plan takes and hands on. The plan's file is kept outside the model's folder, where vLLM takes
every safetensors file for weights.

**Blocks are pages.** A block of vLLM is one page of every layer: the records of `kvloom.pages`, in each layer as many
bytes as its entry says. The memory that vLLM gives a worker's cache is so many times `block_nbytes`.

**The exact tail lies in blocks, too.** The tokens of a page that is not full are exact, as in `kvloom.LoomCache`, and
take more bytes than packed ones. A sequence therefore owns some blocks more than its tokens count for (`spare_blocks`):
its exact tokens start behind the block that will hold their page, so that the page can be packed into it from where
they lie, and the exact tokens of the next page start a block later. So all bytes are counted and given out by vLLM, and
the block table of a sequence leads to everything it has: requests that are preempted or aborted leave nothing behind,
those that resume have blocks of their own, and prefixes are shared in blocks that hold nothing but full pages.

**Sinks** lie, exact, in the first block of a sequence, and page ``p`` in block ``p + 1``, which has some tokens when
the page is full. A prefix of ``n`` shared blocks so ends at the last page that is full within it, less than a page
before the blocks do; vLLM copies the last block, and the request computes those tokens again. A prefix is found by
other requests one step after it was computed.

**Prefill.** The tokens that vLLM gives to one pass read each other as the plan's ``prefill`` says, and earlier ones as
stored. With ``"exact"`` a prompt that vLLM cuts, or that begins with a shared prefix, therefore reads the earlier part
packed, where a whole one reads it exactly; with ``"quantized"`` only the rounding of the model's own sums differs.

**Refused at start-up**, in one sentence: plans that evict, keep a window of recent tokens, pack keys before RoPE, or
whose layers differ in sinks or in the tokens of a page; models with other than full-attention layers, whose blocks vLLM
would pad to the widest, with other than plain causal attention, or with other KV heads in vLLM than in transformers; KV
heads that workers cannot share evenly, context parallelism, speculative decoding, KV transfer and offloading, batch
invariance. What a worker refuses stands in its log.

**Several workers.** With ``--tensor-parallel-size`` each worker serves its part of the plan, `kvloom.Plan.shard`: its
KV heads, with their specs and matrices. Workers that are more than the KV heads hold one head each, as vLLM splits
them. A layer's blocks have the same bytes on all workers, as vLLM asks. Where heads differ those are the bytes of the
worker whose heads need most; on the others the rest of a block holds nothing but exact tokens. With
``--pipeline-parallel-size`` a worker has the blocks of its own layers, and vLLM gives all workers as many as the one
whose layers need most has room for. The plan and its matrices travel with vLLM's configuration to the workers that it
starts, which are the same as processes and under Ray; machines started one by one (``--nnodes``) each read the files.

**One step.** Sequences that decode one token each are appended, packed and attended to together, whatever their
lengths: in every layer one launch that appends and packs for each page layout among its heads, and one of attention for
each. Kernels read and write packed pages and exact tokens where they lie, through vLLM's block table. Where tokens lie
is computed on the device from vLLM's lengths and table by the same operations at every step, so that on a GPU vLLM's
CUDA graphs hold a whole step, attention included; for plans whose formats have no kernels that are safe in a graph they
are captured between layers' attention, and such layers wait for the device. What a GPU packs out of range is raised
some passes later. Tests of the engine run on a CPU, where the reference copies the pages that it reads.

**Prompts**, or their parts, are appended and packed sequence by sequence, by lengths that vLLM has on the host; where
their tokens lie is computed once a pass. Where vLLM itself would read a layer by its FlashAttention and ``prefill`` is
``"exact"``, that function reads them, too: prompts that begin in the pass in one call over the model's own states, not
turned, since no rotation changes what attention gives; a part that follows an earlier one in a call of its own, over
that sequence's pages unpacked. Elsewhere kvloom's backend reads them sequence by sequence, as it does parts of so few
tokens that packed pages are read faster.
"""

from __future__ import annotations

from kvloom._extras import require
from kvloom.integrations.vllm._layout import block_layouts, block_nbytes, spare_blocks

__all__ = ["block_layouts", "block_nbytes", "register", "spare_blocks"]


def register() -> None:
    """Make the quantisation method ``kvloom`` known to vLLM, which calls this in each of its processes.

    Raises:
        MissingExtraError: vLLM is not installed.
    """
    require("vllm", "kvloom.integrations.vllm")
    from kvloom.integrations.vllm import _config, _spec

    _spec.register()
    _config.register()
