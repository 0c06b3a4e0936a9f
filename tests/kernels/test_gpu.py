"""The same codes and the same attention on a GPU as on the CPU."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kvloom
from kvloom import _extras
from kvloom.kernels import backend
from kvloom.pages import Format, page_layout

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_encode_gives_the_same_bytes(bits: int, head_dim: int) -> None:
    layout = page_layout(Format(bits, "per_channel", 32), Format(bits, "per_token", 16), head_dim)
    key, value = torch.randn(2, 2, 3, 128, head_dim)
    on_cpu = backend(key.device).encode(key, value, layout)
    on_gpu = backend(torch.device("cuda")).encode(key.cuda(), value.cuda(), layout)
    assert torch.equal(on_cpu, on_gpu.cpu())


@pytest.mark.parametrize("codec", ["clipped", "hqq", "quanto"])
def test_other_codecs_are_packed_alike_and_read_by_the_kernels(codec: str) -> None:
    if codec in _extras.EXTRAS and _extras.missing(codec):
        pytest.skip(f"the extra {codec} is not installed")
    layout = page_layout(Format(4, "per_channel", 64, codec=codec), Format(2, "per_token", 32, codec=codec), 64)
    key, value = torch.randn(2, 2, 3, 128, 64)
    on_cpu = backend(key.device).encode(key, value, layout)
    gpu = backend(torch.device("cuda"))
    on_gpu = gpu.encode(key.cuda(), value.cuda(), layout)
    assert float((on_cpu != on_gpu.cpu()).float().mean()) < 1e-3
    wanted = backend(key.device).decode(on_cpu, layout, torch.float16)
    for got, want in zip(gpu.decode(on_cpu.cuda(), layout, torch.float16), wanted, strict=True):
        assert torch.equal(got.cpu(), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_model_generates_on_the_gpu(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=128,
    )
    model = LlamaForCausalLM(config).to("cuda", dtype).eval()
    kvloom.enable(model)
    ids = torch.randint(3, 128, (2, 150), device="cuda")
    exact = kvloom.LoomCache(kvloom.Plan.uniform(model, 16, 16), model)
    packed = kvloom.LoomCache(kvloom.Plan.uniform(model, 4, 2), model)
    with torch.no_grad():
        dense = model(ids).logits
        through = torch.cat([model(ids[:, i : i + 75], past_key_values=exact).logits for i in (0, 75)], dim=1)
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    assert torch.allclose(dense, through, atol=tolerance * float(dense.abs().max()))
    out = model.generate(ids, past_key_values=packed, max_new_tokens=100, do_sample=False, pad_token_id=0)
    assert out.shape[1] > 150
    assert packed.nbytes() == packed.plan.nbytes(2, packed.get_seq_length(), dtype)
