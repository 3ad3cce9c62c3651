"""Answers that are generated and counted where they match."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_runs import MODEL, Cli, write_rows

from fwdllm.answers import Answered, evaluate_answers
from fwdllm.engine.errors import ConfigError, DataError

QUESTIONS = ["What does a cow say?", "What does a dog say?"]
# The bundled model's own answers have this form.
SAYS = r"says (\w+)"


def rows(answers: list[str], chat: bool) -> list[object]:
    if chat:
        return [
            {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
            for q, a in zip(QUESTIONS, answers, strict=True)
        ]
    return [
        {"prompt": f"Question: {q}\nAnswer:", "completion": a}
        for q, a in zip(QUESTIONS, answers, strict=True)
    ]


@pytest.mark.parametrize("chat", [False, True])
def test_right_and_wrong_answers_are_counted(tmp_path: Path, chat: bool) -> None:
    found: list[Answered] = []
    data = write_rows(tmp_path / "a.jsonl", rows(["It says x.", "It says x."], chat))
    options = {"pattern": SAYS, "max_tokens": 12, "on_answer": found.append}
    result = evaluate_answers(MODEL, data, **options)
    assert (result.n_right, result.exact_match, result.n_examples) == (0, 0.0, 2)
    said = [answered.found for answered in found]
    assert said[0] == "moo"
    again = write_rows(tmp_path / "b.jsonl", rows([f"It says {said[0]}.", "It says x."], chat))
    result = evaluate_answers(MODEL, again, **options)
    assert (result.n_right, result.exact_match) == (1, 0.5)


def test_numbers_are_read_as_the_harness_reads_them() -> None:
    assert Answered(1, "", "1,200", "$1200.").right
    assert not Answered(1, "", "1,200", "120").right
    assert not Answered(1, "", "1", None).right


def test_the_command(fwdllm: Cli, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "a.jsonl", rows(["It says moo.", "It says x."], True))
    arguments = ("eval", MODEL, data, "--generate", "--match", SAYS, "--max-tokens", 12)
    outcome = fwdllm(*arguments)
    assert (outcome.code, outcome.out) == (0, "exact match 50.0%, 1 of 2\n")
    assert "line 1: moo, right" in outcome.err
    assert fwdllm(*arguments, "--json").json == {"exact_match": 0.5, "n_right": 1, "n_examples": 2}


def test_bad_input_is_one_sentence(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "a.jsonl", rows(["Moo.", "It says x."], False))
    with pytest.raises(DataError, match=r"a\.jsonl:1: the pattern 'says .* is not in its answer"):
        evaluate_answers(MODEL, data, pattern=SAYS)
    with pytest.raises(ConfigError, match="is not a regular expression"):
        evaluate_answers(MODEL, data, pattern="(")
    with pytest.raises(ConfigError, match="has no group"):
        evaluate_answers(MODEL, data, pattern="moo")
    turns = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Moo."}]
    wrong = [*turns, turns[0], {**turns[1], "weight": 0}]  # context only, so no answer to match
    chat = write_rows(tmp_path / "c.jsonl", [{"messages": wrong}])
    with pytest.raises(DataError, match=r"c\.jsonl:1: there is no prompt with an answer"):
        evaluate_answers(MODEL, chat)
    text = write_rows(tmp_path / "b.jsonl", [{"text": "A cow says moo."}])
    with pytest.raises(DataError, match=r"b\.jsonl:1: there is no prompt with an answer"):
        evaluate_answers(MODEL, text, pattern=SAYS)
