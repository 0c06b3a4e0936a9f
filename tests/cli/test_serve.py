"""`kvloom bench serve`, against a server in this process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from kvloom import _extras
from tests.bench.serving.fake import Fake, served


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str | Path]:
    """What every command line says: a tokenizer of 300 words, and a text of all of them."""
    listed = [f"word{n}" for n in range(300)]
    tokenizer = Tokenizer(WordLevel({word: n for n, word in enumerate(listed)}, listed[0]))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "text.txt").write_text(" ".join(listed))
    monkeypatch.chdir(tmp_path)
    small = ["--requests", "6", "--prompt", "16", "--new", "3", "--output", "runs/serve.jsonl"]
    return ["bench", "serve", tmp_path / "tokenizer", "--text", "text.txt", *small]


def test_two_servers_side_by_side(kvloom, words):
    first, second = Fake(gap_s=0.01), Fake()
    with served(first) as one, served(second) as two:
        servers = ["--server", f"fp16={one}", "--server", f"k4v2={two}"]
        done = kvloom(*words, *servers, "--concurrency", "2", "--rate", "100")
        assert done.exit_code == 0, done.output
        as_json = kvloom(*words, *servers, "--seed", "1", "--json")
    shown = ("tiny, 2 at a time: 6 requests of 16 + 3 tokens", "tiny, 100 a second", "fp16", "k4v2", f"k4v2: {two}")
    assert all(text in done.stdout for text in shown)
    assert done.stdout.endswith("wrote runs/serve.jsonl\n")
    for fake in (first, second):
        asked = [body["prompt"] for body in fake.asked[:14]]
        assert {len(prompt) for prompt in asked} == {16}
        assert len({prompt[0] for prompt in asked}) == 13  # the one to warm up with comes before each traffic
        assert sorted(asked[1:7]) != sorted(body["prompt"] for body in fake.asked[15:21])
    records = json.loads(as_json.stdout)
    assert [(record["server"], record["traffic"]) for record in records] == [
        ("fp16", "8 at a time"),
        ("k4v2", "8 at a time"),
    ]
    assert len(Path("runs/serve.jsonl").read_text().splitlines()) == 6


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--server", "a=http://127.0.0.1:9"], "server a is not there at http://127.0.0.1:9"),
        (["--server", "http://127.0.0.1:9"], "server http://127.0.0.1:9 is not there"),
        (["--server", "a=http://x", "--server", "a=http://y"], "--server a=http://y: another server is named 'a'"),
        (["--server", "a=http://x", "--rate", "fast"], "--rate: cannot read 'fast'"),
        (["--server", "a=http://x", "--prompt", "4K"], "7 prompts of 4096 tokens cannot begin at different places"),
        (["--server", "a=http://x", "--text", "absent.txt"], "'absent.txt' cannot be read"),
    ],
)
def test_mistakes_are_one_line(kvloom, words, more: list[str], message: str):
    done = kvloom(*words, *more)
    assert done.exit_code == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1  # below the place of the bar
    assert not list(Path("runs").glob("*"))


def test_a_tokenizer_that_is_not_there(kvloom, words):
    words[2] = "./nowhere"
    done = kvloom(*words, "--server", "a=http://x")
    assert (done.exit_code, done.stderr) == (2, "error: There is no model folder './nowhere': check the path.\n")


def test_httpx2_is_asked_for(kvloom, words, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(_extras.EXTRAS, "serve", ("no_such_module",))
    done = kvloom(*words, "--server", "a=http://x")
    assert done.exit_code == 2
    assert "kvloom bench serve needs no_such_module: run pip install 'kvloom[serve]'." in done.stderr
