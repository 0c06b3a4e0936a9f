"""Options that are numbers: what they read, and that senseless ones are refused before anything is looked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import typer

from kvloom.cli._app import app

TOKENS = {
    "bench generate": {"--new"},
    "bench kernels": {"--window"},
    "bench serve": {"--new", "--prompt"},
    "calibrate": {"--tokens"},
    "eval": {"--chunk", "--length", "--window"},
    "explore": {"--tokens"},
    "fit": {"--tokens"},
    "generate": {"--max-new-tokens"},
    "plan": {"--tokens", "--window"},
    "profile": {"--evict-tokens", "--recent", "--sinks", "--tokens"},
    "search": {"--tokens", "--window"},
    "show": {"--tokens"},
    "signals compare": {"--chunk", "--tokens", "--window"},
}
NEEDED = {
    "bench serve": ["a", "--server", "http://x"],
    "calibrate": ["a", "--plan", "p.json"],
    "eval": ["a", "--plan", "p.json"],
    "explore": ["a"],
    "generate": ["a", "--prompt", "x"],
    "plan": ["a"],
    "profile": ["a"],
    "search": ["a", "b"],
    "show": ["a"],
    "signals compare": ["a"],
}
EACH = [(command, option) for command, options in TOKENS.items() for option in sorted(options)]


def options(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, str, Any]]:
    """Every option with the name of its command and its own."""
    for name, it in command.commands.items():
        if hasattr(it, "commands"):
            yield from options(it, (*path, name))
        else:
            yield from ((" ".join((*path, name)), max(own.opts, key=len), own) for own in it.params)


def test_every_option_that_is_a_number_of_tokens_reads_them_alike():
    found: dict[str, set[str]] = {}
    for command, name, own in options(typer.main.get_command(app)):
        if own.metavar == "TOKENS" or name in {"--chunk", "--length", "--tokens", "--window"}:
            found.setdefault(command, set()).add(name)
            assert own.metavar == "TOKENS", f"{command} {name} reads numbers in its own way"
    assert found == TOKENS


@pytest.mark.parametrize(("command", "option"), EACH)
def test_a_number_of_tokens_that_cannot_be_read_names_the_option(kvloom, command: str, option: str):
    for word, said in (("4Q", "cannot read '4Q': give a number of tokens"), ("-3", "cannot read '-3'")):
        failed = kvloom(*command.split(), *NEEDED.get(command, []), option, word)
        assert failed.exit_code == 2
        assert f"Invalid value for '{option}': {said}" in failed.stderr


@pytest.mark.parametrize(("command", "option"), [it for it in EACH if it[1] not in {"--recent", "--sinks"}])
def test_no_tokens_are_too_few(kvloom, command: str, option: str):
    if command == "bench kernels":  # no exact tokens are a case
        return
    failed = kvloom(*command.split(), *NEEDED.get(command, []), option, "0")
    assert failed.exit_code == 2
    assert f"Invalid value for '{option}': 0 is too few: give at least" in failed.stderr


def test_4k_is_4096_wherever_it_is_said(kvloom, monkeypatch: pytest.MonkeyPatch):
    seen: list[object] = []

    class Settings:
        def __init__(self, **given: object) -> None:
            seen.append((given["lengths"], given["window"], given["chunk"]))
            raise OSError("far enough")

    monkeypatch.setattr("kvloom.evaluate.Settings", Settings)
    for lengths in (("4K", "1.5k", "640"), ("4096", "1536", "640")):
        given = [word for length in lengths for word in ("--length", length)]
        kvloom("eval", "a", "--plan", "p.json", *given, "--window", "2K", "--chunk", "1K")
    assert seen == [((4096, 1536, 640), 2048, 1024)] * 2


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["plan", "a"], "--max-kld"),
        (["plan", "a"], "--bits"),
        (["plan", "a"], "--bytes-per-token"),
        (["plan", "a"], "--windows"),
        (["plan", "a"], "--at-once"),
        (["search", "a", "b"], "--bits"),
        (["search", "a", "b"], "--trials"),
        (["profile", "a"], "--prompts"),
        (["profile", "a"], "--batch"),
        (["profile", "a"], "--evict-prompts"),
        (["calibrate", "a", "--plan", "p"], "--prompts"),
        (["eval", "a", "--plan", "p"], "--limit"),
        (["eval", "a", "--plan", "p"], "--shots"),
        (["lm-eval", "a", "--plan", "p", "--tasks", "x"], "--limit"),
        (["signals", "compare", "a"], "--windows"),
        (["signals", "compare", "a"], "--batch"),
        (["signals", "compare", "a"], "--bits"),
        (["bench", "generate"], "--repeats"),
        (["bench", "serve", "a", "--server", "http://x"], "--requests"),
    ],
    ids=str,
)
def test_nothing_of_something_is_refused_at_once(kvloom, words: list[str], option: str):
    for number in ("0", "-1"):
        failed = kvloom(*words, option, number)
        assert failed.exit_code == 2
        assert f"Invalid value for '{option}': " in failed.stderr


@pytest.mark.parametrize("word", ["nan", "inf", "much"])
def test_an_amount_is_a_finite_number(kvloom, word: str):
    for option in ("--max-kld", "--bits", "--bytes-per-token"):
        failed = kvloom("plan", "a", option, word)
        assert failed.exit_code == 2
        assert f"Invalid value for '{option}': " in failed.stderr
