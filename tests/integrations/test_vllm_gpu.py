"""A vLLM engine on a GPU decodes what transformers' path does, as near as its rounding is.

python -m pytest -m gpu tests/integrations/test_vllm_gpu.py     # with vLLM's CUDA build
"""

from __future__ import annotations

import os

import pytest
import torch
import transformers

from kvloom.cache import LoomCache, enable
from kvloom.plan import Fingerprint, LayerPlan, Plan, TensorSpec, Window

vllm = pytest.importorskip("vllm", reason="vLLM has an environment of its own")

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_NO_USAGE_STATS"] = "1"

TOKENS = 100
TURNED = {"codec": "clipped", "rotation": "hadamard"}
PLAIN: dict[str, str] = {}
LAYERS = ((8, 8, PLAIN), (4, 4, TURNED), (8, 4, PLAIN), (4, 3, PLAIN))


def layer(number, key, value, more):
    keys = TensorSpec(bits=key, grouping="per_channel", group_size=64, **more)
    values = TensorSpec(bits=value, grouping="per_token", **more)
    return LayerPlan(layers=number, key=keys, value=values, window=Window(sinks=4))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A small random Llama on the GPU, enabled, its folder, a plan whose layers differ, and the plan's file."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=len(LAYERS),
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        initializer_range=0.03,
        eos_token_id=None,
    )
    folder = tmp_path_factory.mktemp("model")
    model = transformers.LlamaForCausalLM(config).half().eval()
    model.save_pretrained(folder)
    entries = tuple(layer(i, *numbers) for i, numbers in enumerate(LAYERS))
    plan = Plan(model=Fingerprint.of(model), layers=entries)
    plan.save(folder.with_name("plan.json"))
    enable(model.cuda())
    return model, folder, plan, folder.with_name("plan.json")


@torch.no_grad()
def forced(model, plan, prompt, tokens):
    """Log-probabilities of ``tokens`` behind the prompt, decoded one by one."""
    cache, inputs, found = LoomCache(plan, model, max_tokens=2048), [prompt], []
    for token in tokens:
        logits = model(torch.tensor(inputs, device="cuda"), past_key_values=cache).logits[0, -1]
        found.append(float(torch.log_softmax(logits.float(), -1)[token]))
        inputs = [[token]]
    return torch.tensor(found)


@pytest.mark.gpu
@pytest.mark.parametrize("eager", [False, True])
def test_log_probabilities_are_those_of_transformers(tiny, eager):
    model, folder, plan, file = tiny
    engine = vllm.LLM(
        model=str(folder),
        hf_overrides={"quantization_config": {"quant_method": "kvloom", "plan": str(file)}},
        dtype="float16",
        skip_tokenizer_init=True,
        max_model_len=2048,
        kv_cache_memory_bytes=256 << 20,
        enforce_eager=eager,
    )
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(512, (n,), generator=draw).tolist() for n in (1, 5, 63, 130, 700)]
    asked = vllm.SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False, logprobs=1)
    for prompt, reply in zip(
        prompts, engine.generate([{"prompt_token_ids": ids} for ids in prompts], asked, use_tqdm=False), strict=True
    ):
        out = reply.outputs[0]
        own = torch.tensor([ways[token].logprob for token, ways in zip(out.token_ids, out.logprobs, strict=True)])
        off = (forced(model, plan, prompt, out.token_ids) - own).abs()
        assert len(out.token_ids) == TOKENS
        assert float(off.mean()) < 0.02
        assert float(off.max()) < 0.1
