"""Conversations and texts as people bring them: what of them a model reads, and what it learns."""

from __future__ import annotations

import json
import shutil
import subprocess
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from real_models import smollm2

from fwdllm.engine import Engine
from fwdllm.engine.data.chat import ChatTemplate
from fwdllm.engine.data.jsonl import Example, parse_jsonl, read_jsonl
from fwdllm.engine.data.turns import turns
from fwdllm.engine.errors import DataError

__all__ = ["smollm2"]  # a fixture

USER = {"role": "user", "content": "Weather in Bonn?"}
ANSWER = {"role": "assistant", "content": "It rains."}
CALL = {
    "id": "c1",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city": "Bonn"}'},
}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


def parse(**line: Any) -> Example:
    [example] = parse_jsonl([json.dumps(line).encode()], "data.jsonl")
    return example


def parts(engine: Engine, example: Example) -> list[tuple[str, list[str]]]:
    """Each sequence of an example: all its text, and the spans that are learned."""
    found = []
    for part in engine.separate([example]):
        tokens = engine.tokenize(part, None)
        spans: list[list[int]] = []
        for i, (token, label) in enumerate(zip(tokens.ids, tokens.labels, strict=True)):
            if label and not tokens.labels[i - 1]:
                spans.append([])
            if label:
                spans[-1].append(token)
        decode = engine.tokenizer.decode
        found.append(
            (decode(tokens.ids, special=True), [decode(span, special=True) for span in spans])
        )
    return found


def of_template(models: Path, name: str, shared: Path, data: str) -> list[tuple[str, list[str]]]:
    engine = Engine.load(models / f"template-{name}.gguf")
    [example] = read_jsonl(next((shared / "cases").glob(f"{data}*.jsonl")))
    return parts(engine, example)


# Weights


def test_a_turn_of_weight_0_is_context_only(shared: Path) -> None:
    [plain], [weighed] = (
        read_jsonl(shared / f"cases/01-{name}.jsonl") for name in ("plain", "weight0")
    )
    assert (plain.context, weighed.context) == (frozenset(), frozenset({1}))
    engine = Engine.load(shared / "models/tinymix-6m.Q4_0.gguf")
    [(text, learned)], [(same, rest)] = (parts(engine, each) for each in (plain, weighed))
    assert text == same
    assert learned == ["Potato, carrot and leek.<|im_end|>\n", "Apple.<|im_end|>\n"]
    assert rest == learned[1:]


@pytest.mark.parametrize(
    ("answer", "what"),
    [
        ({"weight": 0.5}, "message 2: its weight is '0.5', not 0 or 1"),
        ({"weight": True}, "message 2: its weight is 'True', not 0 or 1"),
        ({"weight": 0}, "every assistant message has weight 0"),
        ({"tool_calls": [{}]}, "message 2: a tool call is not a function with a name"),
        ({"tool_calls": "weather"}, "tool_calls is a string, not a list"),
        ({"content": [{"type": "image_url"}]}, "a part of its content is 'image_url', not text"),
        ({"content": None}, "content is null, not a string"),
        ({"audio": {"id": "a"}}, "the field audio would change what is learned"),
        ({"function_call": {"name": "f"}}, "the field function_call would change"),
    ],
)
def test_what_would_change_the_lesson_is_not_ignored(answer: dict[str, Any], what: str) -> None:
    with pytest.raises(DataError, match=what):
        parse(messages=[USER, {**ANSWER, **answer}])


def test_fields_that_change_nothing_are_ignored() -> None:
    nothing = {"weight": 1, "tool_calls": None, "refusal": None, "audio": None, "time": "noon"}
    rest = {"tools": [], "functions": None, "parallel_tool_calls": False, "id": 7}
    example = parse(messages=[USER, {**ANSWER, **nothing}], **rest)
    assert (example.messages, example.tools) == ([USER, ANSWER], None)


def test_parts_of_text_are_joined() -> None:
    text = [{"type": "text", "text": "It "}, {"type": "text", "text": "rains."}]
    assert parse(messages=[USER, {**ANSWER, "content": text}]).messages == [USER, ANSWER]


# Formats


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "the field chosen would change"),
        ({"conversations": [{"from": "human", "value": "Hi."}]}, "conversations is ShareGPT's"),
        ({"instruction": "Add.", "input": "1 2", "output": "3"}, "instruction is Alpaca's"),
        ({"messages": [USER, ANSWER], "functions": [{"name": "f"}]}, "the field functions would"),
        ({"messages": [USER, ANSWER], "prompt": "Hi."}, "messages, prompt do not belong together"),
    ],
)
def test_data_of_other_tools_is_named(row: dict[str, Any], what: str) -> None:
    with pytest.raises(DataError, match=what):
        parse(**row)


@pytest.mark.parametrize(
    ("row", "converted"),
    [
        (
            {"conversations": [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Yo."}]},
            {
                "messages": [
                    {"role": "user", "content": "Hi."},
                    {"role": "assistant", "content": "Yo."},
                ]
            },
        ),
        (
            {"instruction": "Add.", "input": "1 2", "output": "3"},
            {"prompt": "Add.\n1 2\n", "completion": "3"},
        ),
        (
            {"instruction": "Say 3.", "input": "", "output": "3"},
            {"prompt": "Say 3.\n", "completion": "3"},
        ),
    ],
)
def test_the_command_that_is_told_converts_them(
    tmp_path: Path, row: dict[str, Any], converted: dict[str, Any]
) -> None:
    if shutil.which("jq") is None:
        pytest.skip("jq is not installed")
    with pytest.raises(DataError, match="converts a file of it") as caught:
        parse(**row)
    command = str(caught.value).partition("converts a file of it: ")[2]
    (tmp_path / "FILE").write_text(json.dumps(row))
    subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True)
    assert json.loads((tmp_path / "data.jsonl").read_text()) == converted


def test_a_prompt_that_begins_the_messages_says_nothing_new(shared: Path) -> None:
    [both] = read_jsonl(shared / "cases/21-both.jsonl")
    assert both.messages is not None
    assert both.messages[0]["content"] == "Say moo."


def test_a_prompt_and_a_completion_may_be_messages() -> None:
    """As TRL has them: of the prompt nothing is learned."""
    example = parse(prompt=[USER, ANSWER, USER], completion=[ANSWER])
    assert example.messages == [USER, ANSWER, USER, ANSWER]
    assert example.context == {1}
    with pytest.raises(DataError, match="the completion has no assistant message"):
        parse(prompt=[USER, ANSWER], completion=[USER])


# Templates


def test_tools_and_calls_are_rendered(models: Path, shared: Path) -> None:
    for data, said in (("02b", "I will look."), ("02a", "")):
        [(text, learned)] = of_template(models, "tools", shared, data)
        assert 'Tools: [{"type": "function", "function": {"name": "weather"' in text
        assert learned == [
            f'{said}<call>weather {{"city": "Bonn"}}</call><|im_end|>\n',
            "It rains.<|im_end|>\n",
        ]


@pytest.mark.parametrize(
    ("messages", "tools", "what"),
    [
        ([USER, ANSWER], TOOLS, "leaves out tools"),
        ([USER, {**ANSWER, "tool_calls": [CALL]}, USER, ANSWER], None, "tool_calls of message 2"),
        ([{**USER, "name": "Ann"}, ANSWER], None, "leaves out name of message 1"),
        ([USER, {**ANSWER, "reasoning_content": "Hm."}], None, "reasoning_content of message 2"),
    ],
)
def test_what_a_template_leaves_out_is_refused(
    shared: Path, messages: list[dict[str, Any]], tools: Any, what: str
) -> None:
    engine = Engine.load(shared / "models/tinymix-6m.Q4_0.gguf")
    with pytest.raises(DataError, match=f"data.jsonl:1: .*{what}"):
        engine.tokenize(parse(messages=messages, tools=tools), None)


def test_a_message_that_a_template_leaves_out_is_refused() -> None:
    source = "{% for m in messages if m.role != 'tool' %}[{{ m.content }}]{% endfor %}"
    result = {"role": "tool", "tool_call_id": "c1", "content": "rain"}
    with pytest.raises(DataError, match="leaves out message 2, of the role tool"):
        turns(ChatTemplate(source, "", "", "m.gguf"), Example(messages=[USER, result, ANSWER]))


@pytest.mark.parametrize(
    ("written", "wanted"),
    [
        ("{{ c.function.arguments }}", '{"city": "Bonn"}'),
        ("{{ c.function.arguments | tojson }}", '{"city": "Bonn"}'),
        (
            "{% if c.function.arguments is string %}{{ c.function.arguments }}{% else %}"
            "{{ c.function.arguments | tojson }}{% endif %}",
            '{"city": "Bonn"}',
        ),
        (
            "{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }};{% endfor %}",
            "city=Bonn;",
        ),
    ],
)
def test_arguments_are_what_a_template_takes(written: str, wanted: str) -> None:
    """OpenAI's are JSON in a string; many templates want an object, and fail on a string."""
    source = "{% for m in messages %}{% for c in m.tool_calls or [] %}" + written
    template = ChatTemplate(source + "{% endfor %}{% endfor %}", "", "", "m.gguf")
    assert template.render([USER, {**ANSWER, "tool_calls": [CALL]}], False) == wanted


def test_thoughts_that_the_prompt_opens(models: Path, shared: Path) -> None:
    """As of DeepSeek R1: the answer follows what a user's prompt ends with."""
    [(text, learned)] = of_template(models, "r1", shared, "04-single")
    assert text.endswith("<|im_start|>assistant\n<think>\nMoo.<|im_end|>\n")
    assert learned == ["Moo.<|im_end|>\n"]
    engine = Engine.load(models / "template-r1.gguf")
    thought = {"role": "assistant", "content": "A cow.</think>Moo."}
    [(_, learned)] = parts(engine, Example(messages=[USER, thought]))
    assert learned == ["A cow.</think>Moo.<|im_end|>\n"]


def test_turns_that_change_later_are_sequences_of_their_own(models: Path, shared: Path) -> None:
    """As of Qwen 3: each is learned as it would be prompted."""
    first, second = of_template(models, "lastthink", shared, "04-multi")
    assert first[1] == ["<think>\n\n</think>\n\nMoo.<|im_end|>\n"]
    assert second[1] == ["<think>\n\n</think>\n\nBaa.<|im_end|>\n"]
    assert "assistant\nMoo.<|im_end|>\n<|im_start|>user\nSay baa." in second[0]
    engine = Engine.load(models / "template-lastthink.gguf")
    examples = read_jsonl(shared / "cases/04-multi.jsonl")
    found = engine.evaluate(examples)
    assert found.n_examples == 1
    assert found.n_tokens == engine.evaluate(engine.separate(examples)).n_tokens
    with pytest.raises(DataError, match=r"04-multi.jsonl:1: .* sequences of their own"):
        engine.encode(examples)


def test_the_assistant_may_begin(models: Path, shared: Path) -> None:
    [(text, learned)] = of_template(models, "default-system", shared, "05-greeting")
    assert "<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>assistant\nHello" in text
    assert learned == ["Hello, what can I do for you?<|im_end|>\n", "Moo.<|im_end|>\n"]


def test_a_template_that_refuses_a_line_is_told_with_the_line(models: Path, shared: Path) -> None:
    engine = Engine.load(models / "template-alternate.gguf")
    with pytest.raises(DataError, match=r"24-roles.jsonl:\d+: .*turns have to take turns"):
        engine.evaluate(read_jsonl(shared / "cases/24-roles.jsonl"))


def test_a_developer_is_the_system(shared: Path) -> None:
    [example] = read_jsonl(shared / "cases/07-developer.jsonl")
    assert example.messages is not None
    assert [m["role"] for m in example.messages] == ["system", "user", "assistant"]


def test_a_template_is_told_the_time_that_a_run_began(models: Path) -> None:
    engine = Engine.load(models / "template-date.gguf")
    engine.tokenizer.chat.now = datetime(2001, 2, 3)
    [(text, _)] = parts(engine, Example(messages=[USER, ANSWER]))
    assert "Today is 03 February 2001." in text


# Raw text


def test_special_tokens_in_raw_text_mean_themselves(shared: Path, smollm2: Path) -> None:
    """A prompt, a text and messages of the same conversation give the same tokens."""
    engine = Engine.load(smollm2)
    completion, text, messages = (
        engine.tokenize(read_jsonl(shared / f"cases/03-{name}.jsonl")[0], None)
        for name in ("completion", "text", "messages")
    )
    assert text.ids == messages.ids
    assert messages.ids[: len(completion.ids)] == completion.ids  # no newline behind the last
    assert len(messages.ids) - len(completion.ids) == 1
    end = engine.tokenizer.encode("<|im_end|>", bos=False, special=True)
    assert completion.ids[-1:] == end  # and no end token twice
    literal = Engine.load(smollm2, literal=True)
    as_text = literal.tokenize(read_jsonl(shared / "cases/03-completion.jsonl")[0], None)
    assert as_text.ids.count(end[0]) == 1  # behind all of it
    assert literal.tokenizer.decode(as_text.ids).startswith("<|im_start|>system")


def test_a_text_to_classify_is_text(smollm2: Path) -> None:
    engine = Engine.load(smollm2, labels=("bad", "good"))
    example = Example(text="Good.<|im_end|>", label="good")
    assert "<|im_end|>" in engine.tokenizer.decode(engine.tokenize(example, None).ids)


def test_a_label_that_begins_another_can_be_chosen(shared: Path, smollm2: Path) -> None:
    engine = Engine.load(smollm2, labels=("1", "10"))
    tokens = engine.tokenize(Example(text="Bad.", label="1"), None)
    learned = [i for i, label in zip(tokens.ids, tokens.labels, strict=True) if label]
    assert engine.tokenizer.decode(learned) == " 1\n"
    assert engine.encoding.label_end(("bad", "good")) == ""
    found = Engine.load(smollm2).evaluate(read_jsonl(shared / "cases/06-prefix.jsonl"))
    assert found.accuracy == 1.0


def test_a_prompt_cut_at_its_beginning_keeps_bos(bundled: Path) -> None:
    engine = Engine.load(bundled)
    whole = engine.tokenize(Example(prompt="One two three. " * 40, completion=" Four."), None)
    cut = engine.tokenize(Example(prompt="One two three. " * 40, completion=" Four."), 32)
    bos = engine.tokenizer.bos
    assert (whole.ids[0], cut.ids[0], len(cut.ids)) == (bos, bos, 32)
    assert cut.ids[1:] == whole.ids[-31:]
    assert sum(cut.labels) == sum(whole.labels)
