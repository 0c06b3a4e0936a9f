"""A GGUF file becomes an ordinary Hugging Face folder, once: it then loads in a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvloom._extras import require


def convert_gguf(file: Path, folder: Path) -> None:
    """Write the model (float32) and tokenizer of the GGUF `file` into `folder`.

    transformers' reader takes the end-of-sequence token of llama-type files from the wrong field
    and leaves padding unset; both are set here from the file's own metadata.

    Raises:
        MissingExtraError: the `gguf` extra is not installed.
    """
    gguf = require("gguf", "Converting the packaged model")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), **source)
    fields = gguf.GGUFReader(str(file)).fields
    tokenizer.eos_token = _special_token(fields, "eos")
    tokenizer.pad_token = _special_token(fields, "padding")
    model = AutoModelForCausalLM.from_pretrained(str(file.parent), dtype=torch.float32, **source)
    _forget_quantisation(model)
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))


def _special_token(fields: Any, role: str) -> str:
    tokens = fields["tokenizer.ggml.tokens"].contents()
    token: str = tokens[fields[f"tokenizer.ggml.{role}_token_id"].contents()]
    return token


def _forget_quantisation(model: Any) -> None:
    """The weights are plain floats now; without this `save_pretrained` refuses to write them."""
    model.config.__dict__.pop("quantization_config", None)
    model.hf_quantizer = None
    model.is_quantized = False
