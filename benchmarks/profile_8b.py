"""What a profile of an 8B model costs: seconds and peak memory, on random weights of Llama 3.1 8B's shape.

    python -m benchmarks.profile_8b                                       # one GPU, bf16
    python -m benchmarks.profile_8b --device cpu --layers 2 --tokens 256 --prompts 2   # does it run?

16 prompts of 2,048 random tokens, the default signal and formats. Bounds: 60 seconds, and 1.3 times the weights plus
what a plain backward pass to the embeddings keeps for one prompt (transformers' own attention, measured in the same
run). Seconds include what a first pass loads.
"""

from __future__ import annotations

import time
from argparse import ArgumentParser

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.figures import Verdict
from kvloom.signals import DEFAULT_SIGNAL, compute_profile

SECONDS = 60.0
WEIGHTS_SHARE = 1.3
_GIB = 2**30
_VOCABULARY = 128_256


def llama_8b(layers: int, device: str) -> LlamaForCausalLM:
    """Random weights of Llama 3.1 8B's shape in bf16, in evaluation mode."""
    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def activations(model: LlamaForCausalLM, prompt: Tensor) -> int:
    """Bytes that a backward pass to the embeddings of a prompt `[1, tokens]` needs, output included."""
    embedded = model.get_input_embeddings()(prompt).requires_grad_()
    before = torch.cuda.memory_allocated()
    logits = model(inputs_embeds=embedded, use_cache=False).logits
    held = torch.cuda.memory_allocated() - before
    del logits
    return held


def main() -> None:
    """Measure and print the verdicts."""
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--signal", default=DEFAULT_SIGNAL)
    asked = parser.parse_args()
    torch.manual_seed(0)
    model = llama_8b(asked.layers, asked.device)
    tokens = torch.randint(_VOCABULARY, (asked.prompts, asked.tokens))
    weights = sum(weight.untyped_storage().nbytes() for weight in model.parameters())
    on_gpu = model.device.type == "cuda"
    kept = activations(model, tokens[:1].to(model.device)) if on_gpu else 0
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()

    def progress(done: int, total: int, what: str) -> None:
        print(f"{time.perf_counter() - started:7.1f} s  {done}/{total}  {what}", flush=True)

    compute_profile(model, tokens, signal=asked.signal, batch=asked.batch, progress=progress)
    seconds = time.perf_counter() - started
    print(Verdict(seconds <= SECONDS, f"{seconds:.1f} s, at most {SECONDS:g}"))
    print(f"weights {weights / _GIB:.2f} GiB")
    if on_gpu:
        peak, bound = torch.cuda.max_memory_allocated(), WEIGHTS_SHARE * weights + kept
        said = f"peak {peak / _GIB:.2f} GiB, at most {bound / _GIB:.2f}: {WEIGHTS_SHARE:g} times the weights and "
        print(Verdict(peak <= bound, f"{said}{kept / _GIB:.2f} GiB that one prompt's backward pass keeps"))


if __name__ == "__main__":
    main()
