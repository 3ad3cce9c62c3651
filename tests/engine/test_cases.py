"""Models and data as people bring them: the inputs of shared/cases, and what must happen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from case_models import make_models, models

from fwdllm.engine import Engine
from fwdllm.engine.data.jsonl import Example, parse_jsonl, read_jsonl
from fwdllm.engine.errors import DataError, FwdllmError

__all__ = ["make_models", "models"]  # fixtures

TEXT = Example(text="The market opened higher on Monday, and shares of energy firms rose.")


def loss(path: Path, backend: str) -> float:
    return Engine.load(path, backend=backend).evaluate([TEXT]).loss


@pytest.mark.parametrize("name", ["rope-scale-linear", "rope-factor-without-type"])
def test_positions_are_scaled_as_by_llama_cpp(models: Path, shared: Path, name: str) -> None:
    """A factor under its old name, and one without a type, are of linear scaling."""
    ours, theirs = (loss(models / f"{name}.gguf", backend) for backend in ("fwdllm", "llama.cpp"))
    assert ours == pytest.approx(theirs, rel=0.01)
    assert abs(ours - loss(shared / "models/tinymix-6m.Q4_0.gguf", "fwdllm")) > 0.3


def test_a_decoder_that_looks_ahead_is_not_trained_as_causal(models: Path) -> None:
    path = models / "noncausal.gguf"
    with pytest.raises(FwdllmError, match="its attention is not causal, unlike llama's"):
        Engine.load(path, backend="fwdllm")
    with pytest.raises(FwdllmError):
        Engine.load(path).evaluate([Example(prompt="The market", completion=" fell")])


def test_a_matrix_of_one_row_may_have_one_dimension(models: Path, shared: Path) -> None:
    found = [
        Engine.load(path).embed(["a fine film", "dull"])
        for path in (models / "one-token-type.gguf", shared / "models/minilm-l6-v2.F16.gguf")
    ]
    np.testing.assert_allclose(*found, atol=1e-3)


def test_a_factor_of_rank_1_may_have_one_dimension(models: Path, shared: Path) -> None:
    model, adapter = shared / "models/tinymix-6m.Q4_0.gguf", "adapter-rank1-one-dimension.gguf"
    ours, theirs = (
        Engine.load(model, adapter=models / adapter, backend=backend).evaluate([TEXT]).loss
        for backend in ("fwdllm", "llama.cpp")
    )
    assert ours == pytest.approx(theirs, rel=0.01)


def test_a_turn_of_weight_0_is_context_only(shared: Path) -> None:
    [plain], [weighed] = (
        read_jsonl(shared / f"cases/01-{name}.jsonl") for name in ("plain", "weight0")
    )
    assert (plain.context, weighed.context) == (frozenset(), frozenset({1}))
    engine = Engine.load(shared / "models/tinymix-6m.Q4_0.gguf")
    all_of_it, rest = (engine.tokenize(example, None) for example in (plain, weighed))
    assert all_of_it.ids == rest.ids
    assert 0 < sum(rest.labels) < sum(all_of_it.labels)
    last = len(rest.labels) - 1 - all_of_it.labels[::-1].index(True)
    assert rest.labels[last]


def line(message: str, rest: str = "") -> list[bytes]:
    turns = f'{{"role": "user", "content": "Hi."}}, {message}'
    return [f'{{"messages": [{turns}]{rest}}}'.encode()]


ANSWER = '{"role": "assistant", "content": "Yes."'


@pytest.mark.parametrize(
    ("message", "rest", "what"),
    [
        (ANSWER + ', "weight": 0.5}', "", "message 2: its weight is '0.5', not 0 or 1"),
        (ANSWER + ', "weight": true}', "", "message 2: its weight is 'True', not 0 or 1"),
        (ANSWER + ', "weight": 0}', "", "every assistant message has weight 0"),
        (ANSWER + ', "tool_calls": [{}]}', "", "message 2: the field tool_calls would change"),
        (ANSWER + ', "reasoning_content": "Hm."}', "", "the field reasoning_content would change"),
        (ANSWER + "}", ', "tools": [{}]', "the field tools would change what is learned"),
    ],
)
def test_what_would_change_the_lesson_is_not_ignored(message: str, rest: str, what: str) -> None:
    with pytest.raises(DataError, match=what):
        parse_jsonl(line(message, rest), "data.jsonl")


def test_fields_that_change_nothing_are_ignored() -> None:
    rest = ', "tools": [], "functions": null, "parallel_tool_calls": false, "id": 7'
    answer = ANSWER + ', "weight": 1, "tool_calls": null, "refusal": null, "time": "noon"}'
    [example] = parse_jsonl(line(answer, rest), "data.jsonl")
    assert example.messages is not None
    assert example.messages[1] == {"role": "assistant", "content": "Yes."}


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ('{"prompt": "a", "chosen": "b", "rejected": "c"}', "the field chosen would change"),
        ('{"conversations": [{"from": "human", "value": "Hi."}]}', "conversations is ShareGPT's"),
        ('{"instruction": "Add.", "input": "1 2", "output": "3"}', "instruction is Alpaca's"),
    ],
)
def test_data_of_other_tools_is_named(row: str, what: str) -> None:
    with pytest.raises(DataError, match=what):
        parse_jsonl([row.encode()], "data.jsonl")


def test_a_template_that_refuses_a_line_is_told_with_the_line(models: Path, shared: Path) -> None:
    engine = Engine.load(models / "template-alternate.gguf")
    with pytest.raises(DataError, match=r"24-roles.jsonl:\d+: .*turns have to take turns"):
        engine.evaluate(read_jsonl(shared / "cases/24-roles.jsonl"))


def test_a_developer_is_the_system(shared: Path) -> None:
    engine = Engine.load(shared / "models/tinymix-6m.Q4_0.gguf")
    [example] = read_jsonl(shared / "cases/07-developer.jsonl")
    assert example.messages is not None
    roles = {"developer": "system"}
    turns = [{**m, "role": roles.get(m["role"], m["role"])} for m in example.messages]
    assert turns != example.messages
    same = Example(messages=turns)
    assert engine.tokenize(example, None) == engine.tokenize(same, None)


def test_a_prompt_cut_at_its_beginning_keeps_bos(bundled: Path) -> None:
    engine = Engine.load(bundled)
    whole = engine.tokenize(Example(prompt="One two three. " * 40, completion=" Four."), None)
    cut = engine.tokenize(Example(prompt="One two three. " * 40, completion=" Four."), 32)
    bos = engine.tokenizer.bos
    assert (whole.ids[0], cut.ids[0], len(cut.ids)) == (bos, bos, 32)
    assert cut.ids[1:] == whole.ids[-31:]
    assert sum(cut.labels) == sum(whole.labels)
