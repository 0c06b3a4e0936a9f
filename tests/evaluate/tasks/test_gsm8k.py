"""GSM8K: the published prompts, both ways to take an answer's number, and what is refused."""

from __future__ import annotations

import pytest

from kvloom.errors import DataError
from kvloom.evaluate.tasks import Bench, Settings, choose
from kvloom.evaluate.tasks._shots import CHAIN_OF_THOUGHT
from tests.evaluate.tasks.data import TEST, TRAIN, write_gsm8k, write_rows


class Text:
    """A tokenizer whose tokens are the text's code points, with a chat template of marked turns."""

    chat_template = "turns"

    def __call__(self, text, add_special_tokens=True):
        return type("Encoding", (), {"input_ids": [0] * add_special_tokens + [ord(letter) for letter in text]})

    def apply_chat_template(self, turns, tokenize, add_generation_prompt):
        assert not tokenize
        assert add_generation_prompt
        return "".join(f"<{turn['role']}>{turn['content']}" for turn in turns) + "<assistant>"

    def decode(self, ids, skip_special_tokens=False):
        return "".join(chr(token) for token in ids if token or not skip_special_tokens)


class Plain(Text):
    chat_template = None


def cases(task, tokenizer):
    return task.cases(Bench(None, tokenizer, (), None, None, None))


def text_of(case):
    return "".join(chr(token) for token in case.prompt)


@pytest.fixture
def data(tmp_path):
    return write_gsm8k(tmp_path)


def test_eight_chains_of_thought_come_before_a_question(data):
    (task,) = choose(["gsm8k"], Settings(data=data)).tasks
    made = cases(task, Text())
    assert [case.references for case in made] == [[row["answer"]] for row in TEST]
    text = text_of(made[1])
    assert text.startswith("\0Q: There are 15 trees in the grove.")
    assert text.endswith("The answer is 8.\n\nQ: How much is 1 and 2?\nA:")
    assert text.count("\nA: ") == text.count("The answer is ") == 8
    assert "<user>" not in text


def test_limit_and_shots(data):
    (task,) = choose(["gsm8k"], Settings(limit=2, shots=3, data=data)).tasks
    made = cases(task, Text())
    assert len(made) == 2
    assert text_of(made[0]).count("\nA: ") == 3
    assert task.facts()["shots"] == 3
    with pytest.raises(DataError, match="8 published examples, and shots is 9"):
        choose(["gsm8k"], Settings(shots=9, data=data))


def test_the_published_examples_are_right():
    for question, answer in CHAIN_OF_THOUGHT:
        assert question.endswith("?")
        assert answer.rpartition("The answer is ")[2].rstrip(".").isdigit()
    assert [said.rpartition(" ")[2] for _, said in CHAIN_OF_THOUGHT] == [
        "6.",
        "5.",
        "39.",
        "8.",
        "9.",
        "29.",
        "33.",
        "8.",
    ]


def test_turns_of_a_chat_hold_rows_of_the_training_set(data):
    (task,) = choose(["gsm8k_multiturn"], Settings(limit=1, data=data)).tasks
    text = text_of(cases(task, Text())[0])
    assert text.count("<user>") == 17
    first = TRAIN[0]
    assert text.startswith(f"<user>Question: {first['question']}\nAnswer:<assistant>{first['answer']}<user>")
    assert text.endswith(f"<user>Question: {TEST[0]['question']}\nAnswer:<assistant>")
    with pytest.raises(DataError, match="no chat template"):
        cases(task, Plain())
    with pytest.raises(DataError, match="shows 21 training rows, and there are 20"):
        choose(["gsm8k_multiturn"], Settings(shots=21, data=data))


@pytest.mark.parametrize(
    ("name", "answer", "flexible", "strict"),
    [
        ("gsm8k", " 1 + 2 = 3. The answer is 3.", 1, 1),
        ("gsm8k", " so we get 3", 1, 0),
        ("gsm8k", " The answer is 3. Not 4", 0, 1),
        ("gsm8k", "", 0, 0),
        ("gsm8k_multiturn", "1 + 2 = 3\n#### 3", 1, 1),
        ("gsm8k_multiturn", "#### 3 or 4", 0, 1),
    ],
)
def test_answers(data, name, answer, flexible, strict):
    (task,) = choose([name], Settings(data=data)).tasks
    case = cases(task, Text())[1]
    assert task.scores(case, answer) == {"flexible": flexible, "strict": strict}
    assert next(iter(task.scores(case, answer))) == "flexible"


def test_missing_or_foreign_rows_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"There is no '.*gsm8k.test\.jsonl': put the published file there"):
        choose(["gsm8k"], Settings(data=tmp_path))
    write_rows(tmp_path / "gsm8k" / "test.jsonl", [{"question": "x"}])
    with pytest.raises(DataError, match=r"Row 1 of test\.jsonl has no 'answer'"):
        choose(["gsm8k"], Settings(data=tmp_path))
    (tmp_path / "gsm8k" / "test.jsonl").write_text('{"question": "x", "answer": "#### 1"}\n[]\n')
    with pytest.raises(DataError, match=r"Line 2 of test\.jsonl is not a JSON object"):
        choose(["gsm8k"], Settings(data=tmp_path))
    write_rows(tmp_path / "gsm8k" / "test.jsonl", [{"question": "x", "answer": "3"}])
    with pytest.raises(DataError, match=r'Row 1 of test\.jsonl has no "#### " in its answer'):
        choose(["gsm8k"], Settings(data=tmp_path))
    with pytest.raises(DataError, match="limit is 0"):
        Settings(limit=0)
