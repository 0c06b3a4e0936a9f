from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kvloom.assets import load_config, load_model
from kvloom.errors import DataError, ModelError, PlanError


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A local folder with a random bfloat16 model and a two-word tokenizer."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    folder = tmp_path_factory.mktemp("tiny")
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    words = Tokenizer(WordLevel({"warp": 0, "weft": 1, "?": 2}, unk_token="?"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return folder


def test_a_local_folder_loads_for_evaluation_in_float32_on_a_cpu(tiny: Path):
    model, tokenizer = load_model(tiny, device="cpu")
    assert model.dtype == torch.float32
    assert not model.training
    assert tokenizer("weft").input_ids == [1]


@pytest.mark.parametrize("dtype", ["float16", "fp16", "half", torch.float16])
def test_dtype_by_name_or_object(tiny: Path, dtype: torch.dtype | str):
    model, _ = load_model(str(tiny), dtype=dtype, device="cpu")
    assert model.dtype == torch.float16


@pytest.mark.gpu
def test_the_checkpoints_own_dtype_on_a_gpu(tiny: Path):
    model, _ = load_model(tiny)
    assert model.device.type == "cuda"
    assert model.dtype == torch.bfloat16


def test_unfetched_model_says_which_command_fetches_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("KVLOOM_CACHE", str(tmp_path))
    with pytest.raises(DataError, match="run `kvloom fetch`"):
        load_model()


@pytest.mark.parametrize("name", ["./absent", "/absent", Path("absent")])
def test_absent_folder(name: str | Path):
    with pytest.raises(ModelError, match=r"There is no model folder .*absent"):
        load_model(name, device="cpu")


def test_hub_id_out_of_reach_is_one_sentence():
    with pytest.raises(ModelError, match="'nobody/nothing' cannot be loaded") as caught:
        load_model("nobody/nothing", device="cpu")
    assert "\n" not in str(caught.value)


def test_folder_without_a_model(tmp_path: Path):
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(tmp_path, device="cpu")


def test_packaged_model_speaks(smollm2):
    """Right weights, right chat template, right end-of-sequence and padding tokens."""
    model, tokenizer = smollm2
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    text = tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])
    assert text == "The capital of France is Paris.<|im_end|>"
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    assert tokenizer.eos_token_id == model.config.eos_token_id == 2


def test_a_configuration_loads_without_its_weights(tiny: Path, tmp_path: Path):
    (tmp_path / "config.json").write_text((tiny / "config.json").read_text())
    assert load_config(tmp_path).num_hidden_layers == 1
    with pytest.raises(ModelError, match="There is no model folder"):
        load_config(tmp_path / "none")
    (tmp_path / "config.json").unlink()
    with pytest.raises(ModelError, match=r"configuration of .* cannot be loaded"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"dtype": "fp8"}, "dtype 'fp8' is not known: give one of float16, bfloat16, float32"),
        ({"device": "gpu"}, "device 'gpu' is not here"),
        ({"device": "cuda:99"}, "device 'cuda:99' is not here"),
    ],
)
def test_an_unknown_dtype_or_device_is_one_sentence(tiny: Path, words: dict[str, str], message: str):
    with pytest.raises((ModelError, PlanError), match=message) as caught:
        load_model(tiny, **words)
    assert "\n" not in str(caught.value)
