"""Rows of the published schemas, written by hand."""

from __future__ import annotations

import json
from pathlib import Path

TRAIN = [
    {"question": f"How much is {n} and 1?", "answer": f"It is {n} + 1 = {n + 1}.\n#### {n + 1}"} for n in range(20)
]
TEST = [{"question": f"How much is {n} and 2?", "answer": f"{n} + 2 = {n + 2}.\n#### {n + 2}"} for n in range(4)]
SQUAD = {
    "version": "v2.0",
    "data": [
        {
            "title": f"Article {a}",
            "paragraphs": [
                {
                    "context": f"Article {a}, paragraph {p}. Its colour is colour-{a}-{p}. "
                    + "More words follow. " * 8,
                    "qas": [
                        {
                            "id": f"{a}{p}",
                            "question": f"What is the colour of {a}, {p}?",
                            "is_impossible": False,
                            "answers": [{"text": f"colour-{a}-{p}", "answer_start": 3}],
                        },
                        {"id": f"x{a}{p}", "question": "Impossible?", "is_impossible": True, "answers": []},
                    ],
                }
                for p in range(3)
            ],
        }
        for a in range(6)
    ],
}
HOTPOTQA = [
    {
        "_id": str(row),
        "question": f"Where is {row}?",
        "answer": f"place {row}",
        "context": [[f"Title {row} {p}", ["One sentence. ", f"It is in place {row}."]] for p in range(3)],
    }
    for row in range(8)
]


def write_rows(file: Path, rows: list) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_gsm8k(folder: Path) -> Path:
    write_rows(folder / "gsm8k" / "train.jsonl", TRAIN)
    write_rows(folder / "gsm8k" / "test.jsonl", TEST)
    return folder


def write_ruler(folder: Path) -> Path:
    (folder / "ruler").mkdir(parents=True)
    (folder / "ruler" / "squad.json").write_text(json.dumps(SQUAD))
    (folder / "ruler" / "hotpotqa.json").write_text(json.dumps(HOTPOTQA))
    return folder


def longbench_row(**fields) -> dict:
    row = {
        "input": "Who wrote it?",
        "context": "A long story by Ann.",
        "answers": ["Ann", "Ann Lee"],
        "length": 5,
        "dataset": "narrativeqa",
        "language": "en",
        "all_classes": None,
        "_id": "a1",
    }
    return {**row, **fields}
