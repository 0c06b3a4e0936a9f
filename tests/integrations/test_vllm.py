"""A real vLLM engine serves plans: the tokens of transformers' path, the bytes of the arithmetic, nothing mixed up."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import save_file

from kvloom import kernels
from kvloom.assets import model_dir
from kvloom.cache import LoomCache, disable, enable
from kvloom.errors import ModelError, PlanError
from kvloom.plan import (
    Evict,
    Fingerprint,
    HeadPlan,
    LayerPlan,
    Plan,
    PlanTensors,
    TensorSpec,
    Window,
    preset,
    rotation_name,
)

vllm = pytest.importorskip("vllm", reason="vLLM has an environment of its own: run `make test-vllm`")

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process, but for one test
os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # else every worker is to have a NUMA node of its own

from vllm import LLM, SamplingParams  # noqa: E402
from vllm.config import set_current_vllm_config  # noqa: E402
from vllm.distributed import parallel_state  # noqa: E402
from vllm.distributed.utils import get_pp_indices  # noqa: E402
from vllm.engine.arg_utils import EngineArgs  # noqa: E402
from vllm.model_executor.layers.attention import Attention  # noqa: E402
from vllm.model_executor.layers.attention.prefill_prefix_lm_attention import PrefillPrefixLMAttention  # noqa: E402
from vllm.model_executor.layers.linear import QKVParallelLinear  # noqa: E402
from vllm.model_executor.layers.quantization.fp8 import Fp8Config  # noqa: E402
from vllm.v1.attention.backend import AttentionType  # noqa: E402

from kvloom.integrations.vllm import _config, block_layouts, block_nbytes, spare_blocks  # noqa: E402
from kvloom.integrations.vllm._layout import part_of  # noqa: E402

VOCABULARY = 512
LENGTH = 1024
FIELDS = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": LENGTH,
    "initializer_range": 0.1,  # wide enough for varied tokens; wider and the rounding of sums decides between them
    "eos_token_id": None,
}


def spec(bits, grouping, **more):
    return TensorSpec(bits=bits, grouping=grouping, group_size=64 if grouping == "per_channel" else "head_dim", **more)


MIXED = {
    0: (spec(8, "per_channel"), spec(8, "per_token")),
    1: (spec(4, "per_channel", codec="clipped", rotation="hadamard"), spec(4, "per_token", rotation="hadamard")),
    2: (spec(8, "per_channel"), spec(2, "per_token")),
}
BY_HEAD = {  # of layer 0, for four heads: the first two take more bytes than the others
    0: HeadPlan(key=spec(2, "per_channel", rotation="hadamard")),
    1: HeadPlan(value=spec(16, "per_token")),
    3: HeadPlan(value=spec(5, "per_token", rotation="calibrated")),
}
FEW = {layer: (spec(1, "per_channel"), spec(1, "per_token")) for layer in MIXED}


def make(family, folder, **fields):
    torch.manual_seed(0)
    config = getattr(transformers, family + ("TextConfig" if family == "Gemma3" else "Config"))(**{**FIELDS, **fields})
    model = getattr(transformers, family + "ForCausalLM")(config).eval()
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A small random Llama, enabled, and its folder."""
    folder = tmp_path_factory.mktemp("model")
    model = make("Llama", folder)
    enable(model)
    return model, folder


def plan_of(model, specs, *, window=None, prefill="exact", tensors=None, evict=None):
    entries = [
        LayerPlan(layers=layer, key=key, value=value, window=window or Window(), evict=evict)
        for layer, (key, value) in specs.items()
    ]
    return Plan(model=Fingerprint.of(model), layers=tuple(entries), prefill=prefill, tensors=tensors)


def save(tiny, specs, **more):
    """A plan, written where `options` looks for it."""
    plan = plan_of(tiny[0], specs, **more)
    plan.save(plan_file(tiny[1]))
    return plan


def plan_file(folder):
    return folder.with_name(f"{folder.name}-plan.json")


def options(folder, **changes):
    return {
        "model": str(folder),
        "hf_overrides": {"quantization_config": {"quant_method": "kvloom", "plan": str(plan_file(folder))}},
        "dtype": "float32",
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "max_model_len": LENGTH,
        "kv_cache_memory_bytes": 8 << 20,
        "max_num_seqs": 16,
        **changes,
    }


def prompt(tokens, seed):
    return torch.randint(VOCABULARY, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()


def sampling(tokens):
    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)


def served(engine, prompts, tokens):
    """Greedy tokens of prompts that come at once."""
    inputs = [{"prompt_token_ids": ids} for ids in prompts]
    return [list(out.outputs[0].token_ids) for out in engine.generate(inputs, sampling(tokens), use_tqdm=False)]


def expected(model, plan, ids, tokens):
    """Greedy tokens of transformers with a `LoomCache`."""
    inputs = torch.tensor([ids])
    cache = LoomCache(plan, model)
    out = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        past_key_values=cache,
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    return out[0, len(ids) :].tolist()


@pytest.mark.parametrize("prefill", ["exact", "quantized"])
@pytest.mark.parametrize("sinks", [0, 4])
def test_tokens_are_those_of_transformers(tiny, prefill, sinks):
    plan = save(tiny, MIXED, window=Window(sinks=sinks), prefill=prefill)
    prompts = [prompt(tokens, seed) for seed, tokens in enumerate((1, 5, 63, 64, 160, 200))]
    engine = LLM(**options(tiny[1]))
    assert served(engine, prompts, 40) == [expected(tiny[0], plan, ids, 40) for ids in prompts]


def test_calibrated_rotations_are_applied(tiny):
    turn = torch.linalg.qr(torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(0))).Q
    tensors = PlanTensors.of({rotation_name(0, side): turn.half() for side in ("key", "value")})
    turned = tuple(side.model_copy(update={"rotation": "calibrated"}) for side in MIXED[0])
    plan = save(tiny, {**MIXED, 0: turned}, tensors=tensors)
    ids = prompt(100, 0)
    assert served(LLM(**options(tiny[1])), [ids], 40) == [expected(tiny[0], plan, ids, 40)]


def test_tokens_of_a_real_model_are_those_of_transformers(smollm2, tmp_path):
    model, tokenizer = smollm2
    plan = preset("kvloom/K4V4", model)
    plan.save(plan_file(tmp_path))
    texts = ["The printing press", "Write a story about a robot who learns to paint. " * 8]
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    engine = LLM(**options(tmp_path, model=str(model_dir()), kv_cache_memory_bytes=64 << 20))
    got = served(engine, prompts, 24)
    enable(model)
    wanted = [expected(model, plan, ids, 24) for ids in prompts]
    disable(model)
    assert got == wanted


def test_a_pass_of_sequences_that_decode_is_one_call_a_layer(tiny, monkeypatch):
    """Among them, later on, a prompt: it has a call of its own."""
    save(tiny, MIXED, window=Window(sinks=4))
    backend, calls = type(kernels.backend(torch.device("cpu"))), []
    attend = backend.attend_static
    monkeypatch.setattr(
        backend,
        "attend_static",
        lambda self, query, kv, **more: calls.append(len(query)) or attend(self, query, kv, **more),
    )
    engine = LLM(**options(tiny[1])).llm_engine
    for n, tokens in enumerate((30, 60, 100)):
        engine.add_request(str(n), {"prompt_token_ids": prompt(tokens, n)}, sampling(12))
    for step in range(6):
        engine.step()
        if step == 3:
            engine.add_request("3", {"prompt_token_ids": prompt(50, 3)}, sampling(12))
    layers = len(MIXED)
    assert calls == [3] * 4 * layers + [4] * layers


def dense(impl, calls, *, q, k, v, out, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
    """What vLLM's FlashAttention is on a GPU."""
    calls.append(cu_seqlens_q.diff().tolist())
    for queries, states in zip(pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True):
        own = [x[slice(*at)].transpose(0, 1)[None] for x, at in ((q, queries), (k, states), (v, states))]
        out[slice(*queries)] = kernels.dense_attention(*own, scaling=impl.scale)[0]


def test_prompts_are_read_by_the_function_that_vllm_has_for_them(tiny, monkeypatch):
    """One call a layer for all that begin in a pass."""
    plan, calls = save(tiny, MIXED, window=Window(sinks=4)), []
    monkeypatch.setattr(_config, "varlen_of", lambda impl: partial(dense, impl, calls))
    prompts = [prompt(tokens, seed) for seed, tokens in enumerate((5, 63, 160, 200))]
    engine = LLM(**options(tiny[1]))
    assert served(engine, prompts, 20) == [expected(tiny[0], plan, ids, 20) for ids in prompts]
    assert calls == [[5, 63, 160, 200]] * len(MIXED)


def test_tokens_depend_on_what_is_stored(tiny):
    """Else the other tests would compare nothing."""
    ids = prompt(200, 0)
    coarse = plan_of(tiny[0], FEW)
    assert expected(tiny[0], coarse, ids, 40) != expected(tiny[0], plan_of(tiny[0], MIXED), ids, 40)


def test_the_cache_has_the_tokens_of_the_byte_arithmetic(tiny):
    plan = save(tiny, MIXED, window=Window(sinks=4))
    engine = LLM(**options(tiny[1])).llm_engine
    config = engine.vllm_config.cache_config
    blocks = (8 << 20) // block_nbytes(plan, "float32")
    of_longest = LENGTH // 64 + spare_blocks(block_layouts(plan, "float32"))
    assert (config.block_size, config.num_gpu_blocks) == (64, blocks)
    assert config.kv_cache_size_tokens == int(blocks / of_longest * LENGTH)


@pytest.mark.parametrize("sinks", [0, 4])
def test_a_prefix_may_be_shared_in_the_pass_that_computes_it(tiny, sinks):
    plan = save(tiny, MIXED, window=Window(sinks=sinks), prefill="quantized")
    prompts = [prompt(200, 0) + prompt(9 + n, 1 + n) for n in range(4)]
    assert served(LLM(**options(tiny[1])), prompts, 16) == [expected(tiny[0], plan, ids, 16) for ids in prompts]


@pytest.mark.parametrize("sinks", [0, 4])
def test_many_requests_with_shared_prefixes_get_the_tokens_they_get_alone(tiny, sinks):
    save(tiny, MIXED, window=Window(sinks=sinks), prefill="quantized")
    prefixes = [prompt(tokens, seed) for seed, tokens in enumerate((64, 128, 150, 200))]
    prompts = [prefixes[n % 4] + prompt((45, 45, 25, 40)[n % 4] + n % 16, 100 + n) for n in range(64)]
    new = [24 + n % 10 for n in range(64)]  # so that nearly every request fills a block
    aborted = set(range(3, 64, 5))

    alone = LLM(**options(tiny[1], enable_prefix_caching=False, max_num_seqs=1))
    wanted = {n: served(alone, [prompts[n]], new[n])[0] for n in range(64) if n not in aborted}

    small = {"num_gpu_blocks_override": 78, "max_num_batched_tokens": 160, "disable_log_stats": False}
    crowded = LLM(**options(tiny[1], **small))
    got = crowd(crowded.llm_engine, prompts, new, aborted)
    assert got == wanted
    counts = {metric.name: getattr(metric, "value", None) for metric in crowded.get_metrics()}
    assert counts["vllm:num_preemptions"] > 0
    assert counts["vllm:prefix_cache_hits"] > 0


def crowd(engine, prompts, new, aborted):
    """Tokens by request of all prompts at once; some are aborted while they run."""
    for n, ids in enumerate(prompts):
        engine.add_request(str(n), {"prompt_token_ids": ids}, sampling(new[n]))
    got, seen = {}, set()
    while engine.has_unfinished_requests():
        for out in engine.step():
            n, tokens = int(out.request_id), list(out.outputs[0].token_ids)
            if n in aborted and n not in seen and len(tokens) > 5:
                seen.add(n)
                engine.abort_request([out.request_id])
            elif out.finished and n not in aborted:
                got[n] = tokens
    assert seen == aborted
    return got


def test_an_engine_of_several_processes_serves_the_same(tiny, tmp_path):
    plan = save(tiny, MIXED, window=Window(sinks=4))
    ids = prompt(100, 7)
    file = tmp_path / "serve.py"
    file.write_text(f"""
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    engine = LLM(**{options(tiny[1])!r})
    sampling = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, detokenize=False)
    print(engine.generate([{{"prompt_token_ids": {ids}}}], sampling)[0].outputs[0].token_ids)
""")
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    done = subprocess.run([sys.executable, str(file)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == expected(tiny[0], plan, ids, 20)


def quantise_weights(folder, model):
    """Rewrite a model's folder with weights of 8 bits by output channel, as compressed-tensors stores them."""
    held = dict(model.state_dict())
    for name in [name for name in held if name.endswith("proj.weight")]:
        scale = held[name].abs().amax(dim=1, keepdim=True) / 127
        held |= {name: (held[name] / scale).round().to(torch.int8), f"{name}_scale": scale}
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    eight = {"num_bits": 8, "type": "int", "symmetric": True}
    scheme = {
        "targets": ["Linear"],
        "weights": {**eight, "strategy": "channel", "dynamic": False},
        "input_activations": {**eight, "strategy": "token", "dynamic": True},
    }
    fields = json.loads((folder / "config.json").read_text())
    fields["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": scheme},
    }
    (folder / "config.json").write_text(json.dumps(fields))


def test_quantised_weights_are_served_as_the_checkpoint_says(tmp_path):
    """With an exact plan as without one; and with a plan of few bits not as without."""
    model = make("Llama", tmp_path / "model")
    folder, exact = tmp_path / "model", spec(16, "per_token")
    quantise_weights(folder, model)
    prompts = [prompt(tokens, seed) for seed, tokens in enumerate((20, 100, 150))]
    wanted = served(LLM(**options(folder, hf_overrides={})), prompts, 30)
    got = {}
    for name, specs in {"exact": dict.fromkeys(MIXED, (exact, exact)), "few bits": FEW}.items():
        plan_of(model, specs).save(plan_file(folder))
        got[name] = served(LLM(**options(folder)), prompts, 30)
    assert got["exact"] == wanted != got["few bits"]


def test_scales_of_a_checkpoints_own_cache_have_the_names_of_its_method(tmp_path):
    config = _config.KvloomConfig(str(tmp_path / "plan.json"))
    name = "model.layers.0.self_attn.k_proj.output_scale"
    assert config.get_cache_scale_mapper().apply_list([name]) == [name]
    config.weights = Fp8Config()
    assert config.get_cache_scale_mapper().apply_list([name]) == ["model.layers.0.self_attn.attn.k_scale"]


def add_to_config(folder, fields):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def test_weights_of_an_unknown_kind_are_refused(tmp_path):
    model = make("Llama", tmp_path / "model")
    plan_of(model, MIXED).save(plan_file(tmp_path / "model"))
    add_to_config(tmp_path / "model", {"quantization_config": {"quant_method": "by hand"}})
    refused("the weights of .*model are quantised by 'by hand', which vLLM does not know", tmp_path / "model")


def test_models_of_several_parts_say_with_their_text_how_weights_are_quantised(tmp_path):
    make("Llama", tmp_path)
    add_to_config(tmp_path, {"text_config": {"quantization_config": {"quant_method": "by hand"}}})
    with pytest.raises(ModelError, match="quantised by 'by hand'"):
        _config.weights_config(str(tmp_path), None, None)


def test_a_models_config_may_name_its_plan(tmp_path):
    model = make("Llama", tmp_path / "model")
    plan = plan_of(model, MIXED)
    plan.save(tmp_path / "plan.json")
    asked = {"quant_method": "kvloom", "plan": str(tmp_path / "plan.json")}
    add_to_config(tmp_path / "model", {"quantization_config": asked})
    config = EngineArgs(**options(tmp_path / "model", hf_overrides={})).create_engine_config().quant_config
    assert (config.plan, config.weights) == (plan, None)


# -- models split over workers ----------------------------------------------------------------------------------------

# By seed; their best logit is never so near the next one (0.027) that sums in another order decide between them.
LENGTHS = {6: 5, 5: 64, 3: 200, 7: 300}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A small random Llama of four KV heads, enabled, its folder, and a plan whose KV heads differ."""
    folder = tmp_path_factory.mktemp("wide")
    model = make("Llama", folder, num_attention_heads=8, num_key_value_heads=4)
    enable(model)
    turns = torch.linalg.qr(torch.randn(4, 32, 32, generator=torch.Generator().manual_seed(5))).Q.half()
    entries = [
        LayerPlan(layers=layer, key=key, value=value, window=Window(sinks=4), heads={} if layer else BY_HEAD)
        for layer, (key, value) in MIXED.items()
    ]
    tensors = PlanTensors.of({rotation_name(0, "value"): turns})
    plan = Plan(model=Fingerprint.of(model), layers=tuple(entries), tensors=tensors)
    plan.save(plan_file(folder))
    return model, folder, plan


@contextmanager
def engine_of(folder, **changes):
    """An engine whose workers end with it."""
    engine = LLM(**options(folder, **changes))
    try:
        yield engine
    finally:
        engine.llm_engine.engine_core.shutdown()


def assert_served(engine, model, plan, stages):
    """Tokens of one process; blocks and cache tokens as the bytes of the fullest of the workers' ``stages`` say."""
    prompts = [prompt(tokens, seed) for seed, tokens in LENGTHS.items()]
    config = engine.llm_engine.vllm_config.cache_config
    blocks = (8 << 20) // max(stages)
    of_longest = LENGTH // 64 + spare_blocks(block_layouts(plan, "float32"))
    assert served(engine, prompts, 30) == [expected(model, plan, ids, 30) for ids in prompts]
    assert (config.num_gpu_blocks, config.kv_cache_size_tokens) == (blocks, int(blocks / of_longest * LENGTH))


def test_workers_that_share_the_heads_serve_the_tokens_of_one(wide):
    model, folder, plan = wide
    with engine_of(folder, tensor_parallel_size=2) as engine:
        assert_served(engine, model, plan, [block_nbytes(plan, "float32", 2)])


def test_workers_that_share_the_layers_serve_the_tokens_of_one(wide):
    """vLLM's CPU worker sets its pipeline up only where it compiles."""
    model, folder, plan = wide
    layouts = list(block_layouts(plan, "float32").values())
    stages = [sum(it.nbytes for it in layouts[slice(*get_pp_indices(3, rank, 2))]) for rank in range(2)]
    compiled = {"enforce_eager": False, "compilation_config": {"mode": "DYNAMO_TRACE_ONCE", "backend": "eager"}}
    with engine_of(folder, pipeline_parallel_size=2, **compiled) as engine:
        assert_served(engine, model, plan, stages)


def be_rank(rank, world_size, monkeypatch):
    """Let vLLM take this process for one of several workers."""
    monkeypatch.setattr(parallel_state, "_TP", SimpleNamespace(rank_in_group=rank, world_size=world_size))


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_ranks_follow_the_heads_that_vllm_gives_them(wide, monkeypatch, world_size):
    """A head's number is in its plan, as bits, and in the weights of its keys."""
    heads = {head: HeadPlan(key=spec(bits, "per_channel")) for head, bits in enumerate((1, 2, 3, 4))}
    entry = LayerPlan(layers="0-2", key=spec(8, "per_channel"), value=spec(8, "per_token"), heads=heads)
    plan = Plan(model=wide[2].model, layers=(entry,))
    weights = torch.arange(1, 5.0).repeat_interleave(32)[:, None].expand(-1, 8)
    for rank in range(world_size):
        be_rank(rank, world_size, monkeypatch)
        layer = QKVParallelLinear(8, 32, 8, 4, bias=False, params_dtype=torch.float32)
        layer.weight.data.zero_()
        layer.weight_loader(layer.weight, weights, "k")
        own = [own.key.fmt.bits for own in block_layouts(plan, "float32", rank, world_size)[0].layouts]
        assert layer.weight[layer.num_heads * 32 :][: len(own) * 32 : 32, 0].tolist() == own


def test_a_plan_travels_with_its_matrices(wide, tmp_path):
    """To workers on machines that do not see its files."""
    model, _, plan = wide
    plan.save(tmp_path / "plan.json")
    config = _config.KvloomConfig(str(tmp_path / "plan.json"))
    config.maybe_update_config("wide", model.config)
    sent = pickle.dumps(config)
    for file in tmp_path.iterdir():
        file.unlink()
    there = part_of(pickle.loads(sent).plan, 1, 2)
    assert there.rotations()[0]["value"].equal(plan.rotations()[0]["value"][2:])


# -- refused at start-up ----------------------------------------------------------------------------------------------


def refused(message, folder, **changes):
    with pytest.raises(ValueError, match=message):
        EngineArgs(**options(folder, **changes)).create_engine_config()


def test_a_missing_plan_is_refused(tiny):
    plan_file(tiny[1]).unlink(missing_ok=True)
    refused("cannot read the plan .*-plan.json: No such file", tiny[1])
    refused("quantization kvloom has no plan: name its file", tiny[1], hf_overrides={}, quantization="kvloom")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"plan": "plan.json", "prefill": "quantized"}, "quantization_config.prefill: kvloom takes a plan and nothing"),
        ({"plan": {"layers": []}}, r"quantization_config.plan = {'layers': \[\]}: give the path of a plan's file"),
    ],
)
def test_what_is_asked_besides_a_plans_file_is_refused(tiny, fields, message):
    refused(message, tiny[1], hf_overrides={"quantization_config": {"quant_method": "kvloom", **fields}})


def test_missing_matrices_are_refused(wide, tmp_path):
    _, folder, plan = wide
    plan.save(tmp_path / "plan.json")
    (tmp_path / "plan.tensors.safetensors").unlink()
    asked = {"quantization_config": {"quant_method": "kvloom", "plan": str(tmp_path / "plan.json")}}
    refused("cannot read .*plan.tensors.safetensors, the plan's tensors: No such file", folder, hf_overrides=asked)


def test_plans_that_blocks_cannot_hold_are_refused(tiny):
    save(tiny, MIXED, window=Window(recent=64))
    refused("layers 0: window.recent or recent_ratio is set", tiny[1])
    save(tiny, MIXED, evict=Evict(policy="snapkv", budget=64))
    refused("layers 0: evict is set", tiny[1])


def test_the_plan_of_another_model_is_refused(tiny, tmp_path):
    other = make("Llama", tmp_path, num_hidden_layers=4)
    plan_of(other, {**MIXED, 3: MIXED[0]}).save(plan_file(tiny[1]))
    refused("the plan is for num_layers = 4 and this model has 3", tiny[1])


def test_a_model_of_two_attention_types_is_refused(tmp_path):
    model = make("Gemma3", tmp_path, layer_types=["sliding_attention", "sliding_attention", "full_attention"])
    plan_of(model, {2: MIXED[2]}).save(plan_file(tmp_path))
    refused("1 of the 3 layers of .* have full attention, and vLLM pads", tmp_path)


@pytest.mark.parametrize(
    ("changes", "option"),
    [
        ({"block_size": 32}, "--block-size"),
        ({"kv_cache_dtype": "fp8"}, "--kv-cache-dtype"),
        ({"kv_offloading_size": 1.0}, "--kv-transfer-config or --kv-offloading-size"),
    ],
)
def test_what_packed_blocks_do_not_go_with_is_refused(tiny, changes, option):
    save(tiny, MIXED)
    with pytest.raises(ValueError, match=f"{option} does not go with quantization kvloom"):
        LLM(**options(tiny[1], **changes))


def test_a_model_whose_heads_vllm_counts_otherwise_is_refused(tmp_path):
    """Falcon's new decoder repeats its KV heads before transformers caches them, and vLLM does not."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = transformers.FalconConfig(**sizes, num_kv_heads=2, new_decoder_architecture=True)
    model = transformers.FalconForCausalLM(config)
    model.save_pretrained(tmp_path)
    plan_of(model, MIXED).save(plan_file(tmp_path))
    with pytest.raises(ModelError, match=r"vLLM caches layer 0 as .* = \(2, 32, 32\), and the plan, .* \(4, 32, 32\)"):
        LLM(**options(tmp_path))


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (Attention, {"sliding_window": 64}, "a sliding window"),
        (Attention, {"attn_type": AttentionType.ENCODER_ONLY}, "attention that is not causal"),
        (Attention, {"use_mm_prefix": True}, "tokens of an image that read each other"),
        (PrefillPrefixLMAttention, {}, r"an attention of its own \(PrefillPrefixLMAttention\)"),
    ],
)
def test_other_attention_than_plain_causal_is_refused(kind, changes, message):
    layer = kind.__new__(kind)
    torch.nn.Module.__init__(layer)
    facts = {"sliding_window": None, "kv_sharing_target_layer_name": None, "use_mm_prefix": False}
    for name, fact in {**facts, "attn_type": AttentionType.DECODER, **changes}.items():
        setattr(layer, name, fact)
    layer.impl = SimpleNamespace(alibi_slopes=None)
    with pytest.raises(ModelError, match=f"^layer 3 has {message}, which packed blocks do not go with"):
        _config._refuse_attention(layer, 3)


def refused_by_a_worker(error, message, folder, monkeypatch, world_size=2, **changes):
    """What a worker says to its first layer; an engine of several says so in its log and stops."""
    be_rank(1, world_size, monkeypatch)
    config = EngineArgs(**options(folder, tensor_parallel_size=world_size, **changes)).create_engine_config()
    with set_current_vllm_config(config), pytest.raises(error, match=message):
        config.quant_config.get_quant_method(torch.nn.Embedding(1, 1), "model.embed_tokens")


def test_context_parallelism_is_refused(wide, monkeypatch):
    """vLLM asks for it where KV heads are on several workers each."""
    message = "--decode-context-parallel-size does not go with quantization kvloom"
    refused_by_a_worker(ModelError, message, wide[1], monkeypatch, world_size=8, decode_context_parallel_size=2)


def test_batch_invariance_is_refused(wide, monkeypatch):
    """vLLM asks the attention that it would have taken, not the one that serves the plan."""
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    message = "^VLLM_BATCH_INVARIANT does not go with quantization kvloom"
    refused_by_a_worker(ModelError, message, wide[1], monkeypatch)


def test_heads_that_cannot_be_split_are_refused(tmp_path, monkeypatch):
    model = make("Llama", tmp_path, hidden_size=192, num_attention_heads=6, num_key_value_heads=3)
    plan_of(model, MIXED).save(plan_file(tmp_path))
    message = "^the 3 KV heads of LlamaForCausalLM cannot be split evenly over 2 processes: start a number"
    refused_by_a_worker(ModelError, message, tmp_path, monkeypatch)


def test_pages_that_hold_other_tokens_on_a_rank_are_refused(tiny, monkeypatch):
    wide = TensorSpec(bits=8, grouping="per_channel", group_size=128)
    key, value = MIXED[0]
    entry = LayerPlan(layers="0-2", key=key, value=value, heads={0: HeadPlan(key=wide)})
    Plan(model=Fingerprint.of(tiny[0]), layers=(entry,)).save(plan_file(tiny[1]))
    refused_by_a_worker(PlanError, "KV heads 1 to 1 would hold 64 tokens on their rank", tiny[1], monkeypatch)
