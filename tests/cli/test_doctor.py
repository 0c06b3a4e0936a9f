from __future__ import annotations

import json

import pytest
import torch
import transformers

from kvloom import __version__, _extras


def test_facts_as_json(kvloom, monkeypatch: pytest.MonkeyPatch, tmp_path):
    monkeypatch.setenv("KVLOOM_CACHE", str(tmp_path))
    facts = json.loads(kvloom("doctor", "--json").stdout)
    assert facts["versions"]["kvloom"] == __version__
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["versions"]["transformers"] == transformers.__version__
    assert facts["devices"][0]["device"] == "cpu"
    assert facts["devices"][0]["kernels"] in {"c", "torch"}
    assert len(facts["devices"]) >= 1 + torch.cuda.device_count()
    assert [extra["extra"] for extra in facts["extras"]] == list(_extras.EXTRAS)
    assert not facts["assets"]["model"]["present"]
    assert facts["assets"]["model"]["path"].startswith(str(tmp_path))


def test_what_is_missing_comes_with_its_command(kvloom, monkeypatch: pytest.MonkeyPatch, tmp_path):
    monkeypatch.setenv("KVLOOM_CACHE", str(tmp_path))
    monkeypatch.setattr(_extras, "_found", lambda module: module != "gguf")
    shown = kvloom("doctor").stdout
    assert "[gguf]" in shown
    assert "missing gguf: pip install 'kvloom[gguf]'" in shown
    assert "[hqq]" in shown
    assert "missing hqq" not in shown
    assert shown.count("missing: kvloom fetch") == 2


def test_what_is_there_is_shown_with_its_place(kvloom, fetched):
    shown = kvloom("doctor").stdout
    assert "SmolLM2-135M-Instruct" in shown
    assert "kvloom fetch" not in shown
