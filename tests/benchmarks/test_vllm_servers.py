"""Servers of `benchmarks.vllm_servers` are started, asked and ended; here they only look like vLLM's."""

from __future__ import annotations

import json
import urllib.request
from argparse import Namespace

import pytest
from transformers import AutoConfig, AutoTokenizer

from benchmarks import vllm_servers
from kvloom.errors import PlanError
from kvloom.plan import Plan
from tests.bench.serving.fake import Fake, served
from tests.cache import tiny

LOOKS_LIKE_ONE = """
import http.server, sys
print("GPU KV cache size: 1,234 tokens", flush=True)
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[2])), Answer).serve_forever()
"""


@pytest.fixture
def config():
    return tiny.build("llama").config


def test_a_folder_has_a_config_and_a_word_for_every_id(config, tmp_path):
    folder = vllm_servers.make_folder(config, tmp_path / "model")
    assert AutoConfig.from_pretrained(folder).num_hidden_layers == config.num_hidden_layers
    assert AutoTokenizer.from_pretrained(folder)("t3 t1")["input_ids"] == [3, 1]


def test_plans_are_written_beside_the_model(config, tmp_path):
    assert vllm_servers.cache_arguments("fp8", config, tmp_path / "model") == ["--kv-cache-dtype", "fp8"]
    for cache, bits in (("K4V2", 4), ("kvloom/K3V3", 3)):
        option, said = vllm_servers.cache_arguments(cache, config, tmp_path / "model")
        asked = json.loads(said)["quantization_config"]
        assert (option, asked["quant_method"]) == ("--hf-overrides", "kvloom")
        assert Plan.load(asked["plan"]).spec(0).key.bits == bits


def test_a_server_is_ended_with_what_it_started(tmp_path, monkeypatch, capsys):
    script = tmp_path / "server.py"
    script.write_text(LOOKS_LIKE_ONE)
    monkeypatch.setattr(vllm_servers, "ENTRY", (str(script),))
    with vllm_servers.server("it", [], tmp_path / "log") as url:
        assert urllib.request.urlopen(f"{url}/health").status == 200
        assert "KV cache size: 1,234 tokens" in capsys.readouterr().out
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"{url}/health")


def test_one_that_stops_is_said_with_the_end_of_its_log(tmp_path, monkeypatch):
    monkeypatch.setattr(vllm_servers, "ENTRY", ("-c", "raise SystemExit('no such option')"))
    with (
        pytest.raises(SystemExit, match=r"(?s)it does not start: .*no such option"),
        vllm_servers.server("it", [], tmp_path / "log"),
    ):
        pass


def test_servers_are_asked_the_same():
    asked, fakes = Namespace(loads=vllm_servers.read_loads("2x7+3,3x5+2"), requests=None), [Fake(), Fake()]
    records = []
    for name, fake in zip("ab", fakes, strict=True):
        with served(fake) as url:
            records += vllm_servers.ask(name, url, asked, vocabulary=50)
    names = ("server", "concurrency", "requests", "prompt_tokens", "new_tokens")
    numbers = ((2, 2, 7, 3), (3, 3, 5, 2))
    assert [tuple(it[name] for name in names) for it in records] == [(name, *own) for name in "ab" for own in numbers]
    one, other = (sorted(str(body["prompt"]) for body in fake.asked) for fake in fakes)
    assert one == other
    assert len(set(one)) == len(one)


@pytest.mark.parametrize("wrong", [["--loads", "2x7+3,32x8K+16"], ["--caches", "auto,K4V2,kvloom/K9V9"]])
def test_what_cannot_be_read_is_refused_before_a_server_starts(config, tmp_path, monkeypatch, wrong):
    config.save_pretrained(tmp_path)
    started = []
    monkeypatch.setattr(vllm_servers.subprocess, "Popen", lambda *args, **more: started.append(args))
    monkeypatch.setattr("sys.argv", ["it", "--model", str(tmp_path), "--logs", str(tmp_path / "logs"), *wrong])
    with pytest.raises((SystemExit, PlanError)):
        vllm_servers.main()
    assert started == []


def test_what_was_asked_before_a_run_breaks_off_is_kept(tmp_path, monkeypatch, capsys):
    def broken_off(asked):
        with served(Fake()) as url:
            yield from vllm_servers.ask("a", url, asked, vocabulary=50)
        raise KeyboardInterrupt

    monkeypatch.setattr(vllm_servers, "measured", broken_off)
    monkeypatch.setattr("sys.argv", ["vllm_servers", "--loads", "2x7+3", "--logs", str(tmp_path)])
    with pytest.raises(KeyboardInterrupt):
        vllm_servers.main()
    (record,) = map(json.loads, (tmp_path / "records.jsonl").read_text().splitlines())
    assert (record["server"], record["requests"]) == ("a", 2)
    assert "2 at a time" in capsys.readouterr().out
