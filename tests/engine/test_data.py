"""JSONL reading: each accepted form, each kind of mistake with file and line, and splits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from places import SHARED

from fwdllm.engine.data.jsonl import Example, check_labels, labels_of, read_jsonl, split
from fwdllm.engine.errors import ConfigError, DataError

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
EMPTY_SYSTEM = {"role": "system", "content": ""}


def write(tmp_path: Path, *lines: Any) -> Path:
    """A file of lines; bytes and str as they are, anything else as JSON."""
    path = tmp_path / "data.jsonl"
    encoded = []
    for line in lines:
        text = line if isinstance(line, (bytes, str)) else json.dumps(line)
        encoded.append(text if isinstance(text, bytes) else text.encode())
    path.write_bytes(b"\n".join(encoded) + b"\n")
    return path


@pytest.mark.parametrize(
    ("line", "kind", "fields"),
    [
        ({"messages": CHAT}, "messages", {"messages": CHAT}),
        ({"messages": [EMPTY_SYSTEM, *CHAT]}, "messages", {"messages": [EMPTY_SYSTEM, *CHAT]}),
        ({"prompt": "", "completion": "c"}, "completion", {"prompt": "", "completion": "c"}),
        ({"text": "a\u2028b"}, "text", {"text": "a\u2028b"}),
        ({"text": "t", "label": "good"}, "label", {"text": "t", "label": "good"}),
        ({"text": "t", "label": 3, "id": 9}, "label", {"text": "t", "label": "3"}),
    ],
)
def test_each_kind(tmp_path: Path, line: Any, kind: str, fields: dict[str, Any]) -> None:
    path = write(tmp_path, line)
    (example,) = read_jsonl(path)
    assert example.kind == kind
    assert example == Example(**fields, line=1, path=str(path))


def test_blank_lines_are_skipped_and_counted(tmp_path: Path) -> None:
    path = write(tmp_path, "", {"text": "a"}, "  \r", {"text": "b"}, "")
    examples = read_jsonl(path)
    assert [(e.text, e.line) for e in examples] == [("a", 2), ("b", 4)]
    assert examples[1].where == f"{path}:4"


def test_only_newlines_end_lines(tmp_path: Path) -> None:
    # U+2028, U+0085 and form feed end a line for str.splitlines, but not in JSONL.
    path = write(tmp_path, '{"text": "a\u2028b\u0085c"}', {"text": "d"})
    assert [e.text for e in read_jsonl(path)] == ["a\u2028b\u0085c", "d"]


def test_windows_file(tmp_path: Path) -> None:
    path = write(tmp_path, b'\xef\xbb\xbf{"text": "a"}\r', b'{"text": "b"}\r')
    assert [e.text for e in read_jsonl(path)] == ["a", "b"]


def test_other_message_fields_are_ignored(tmp_path: Path) -> None:
    path = write(tmp_path, {"messages": [{**CHAT[0], "time": "noon"}, CHAT[1]]})
    assert read_jsonl(path)[0].messages == CHAT


USER = {"role": "user", "content": "hi"}
MISTAKES = {
    "bad json": ('{"text": "a"', "not JSON: .*column"),
    "number": ("3", "it is a number, not an object"),
    "list": ("[]", "it is a list, not an object"),
    "null": ("null", "it is null, not an object"),
    "no known field": ({"question": "a"}, "none of the fields"),
    "empty object": ({}, "none of the fields"),
    "text number": ({"text": 1}, "text is a number, not a string"),
    "text null": ({"text": None}, "text is null, not a string"),
    "text empty": ({"text": ""}, "text is empty"),
    "completion empty": ({"prompt": "a", "completion": ""}, "completion is empty"),
    "completion list": ({"prompt": "a", "completion": ["b"]}, "completion is a list"),
    "no completion": ({"prompt": "a"}, "completion is missing"),
    "no prompt": ({"completion": "a"}, "prompt is missing"),
    "prompt object": ({"prompt": {}, "completion": "b"}, "prompt is an object"),
    "two kinds": ({"text": "a", "prompt": "b", "completion": "c"}, "do not belong together"),
    "label of completion": ({"prompt": "a", "completion": "b", "label": 1}, "do not belong"),
    "label alone": ({"label": "a"}, "text is missing"),
    "label nan": ('{"text": "a", "label": NaN}', "label is nan"),
    "label float": ({"text": "a", "label": 1.5}, "label is 1.5"),
    "label bool": ({"text": "a", "label": True}, "label is a bool"),
    "label null": ({"text": "a", "label": None}, "label is null"),
    "label empty": ({"text": "a", "label": ""}, "label is empty"),
    "messages string": ({"messages": "hi"}, "messages is a string, not a list"),
    "messages empty": ({"messages": []}, "no assistant message"),
    "no assistant": ({"messages": [USER]}, "no assistant message"),
    "assistant empty": (
        {"messages": [USER, {"role": "assistant", "content": ""}]},
        "message 2: content is empty",
    ),
    "message string": ({"messages": ["hi"]}, "message 1: it is a string, not an object"),
    "no role": ({"messages": [{"content": "hi"}]}, "message 1: role is missing"),
    "no content": ({"messages": [{"role": "user"}]}, "message 1: content is missing"),
    "role misspelled": ({"messages": [{**USER, "role": "asistant"}]}, "role 'asistant' is not"),
    "content list": ({"messages": [{"role": "user", "content": [3]}]}, "a part of its content"),
    "not utf-8": (b'{"text": "\xff"}', "not UTF-8"),
    "half surrogate": ('{"text": "\\ud800"}', "half of a surrogate pair"),
    "deep": ('{"text": ' + "[" * 200_000, "nested too deeply"),
    "many digits": ('{"text": "a", "n": ' + "9" * 5000 + "}", "too many digits"),
    "label digits": ('{"text": "a", "label": ' + "9" * 5000 + "}", "too many digits"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_name_file_and_line(tmp_path: Path, name: str) -> None:
    line, message = MISTAKES[name]
    path = write(tmp_path, "", line)
    with pytest.raises(DataError, match=message) as caught:
        read_jsonl(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("second", "kind"),
    [({"text": "a"}, "a text without a label"), ({"messages": CHAT}, "a conversation")],
)
def test_mixed_kinds(tmp_path: Path, second: Any, kind: str) -> None:
    path = write(tmp_path, {"text": "a", "label": "x"}, "", second)
    with pytest.raises(DataError) as caught:
        read_jsonl(path)
    expected = f"{path}:3: this is {kind}, but line 1 is a text with a label"
    assert str(caught.value) == f"{expected}; a file holds one kind"


@pytest.mark.parametrize("content", [b"", b"\n \n\r\n", b"\xef\xbb\xbf"])
def test_empty_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match="has no examples"):
        read_jsonl(path)


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_jsonl(tmp_path / "missing.jsonl")
    with pytest.raises(DataError, match="is a folder"):
        read_jsonl(tmp_path)
    with pytest.raises(DataError, match="cannot read"):
        read_jsonl("a\0b")
    with pytest.raises(DataError, match="cannot read"):
        read_jsonl("a" * 5000)


def examples(n: int) -> list[Example]:
    return [Example(text=str(i), label=f"l{i % 3}", line=i + 1, path="d.jsonl") for i in range(n)]


def test_labels() -> None:
    data = [Example(text="a", label=label) for label in ("b", "a", "10", "b")]
    assert labels_of(data) == ("10", "a", "b")
    assert labels_of([Example(text="a")]) == ()


def test_check_labels() -> None:
    check_labels(examples(6), ("l0", "l1", "l2"))
    with pytest.raises(DataError, match=r"^d\.jsonl:2: the label 'l1' is not one of l0, l2$"):
        check_labels(examples(6), ("l0", "l2"))
    with pytest.raises(DataError, match=r"^line 7: it has no label$"):
        check_labels([Example(text="a", line=7)], ("a",))


def test_split_keeps_the_order() -> None:
    for seed in range(5):
        lines = [e.line for e in split(examples(1000), 4, seed)[1]]
        assert lines == sorted(lines)


@pytest.mark.parametrize(("held_out", "count"), [(0.2, 2), (0.25, 2), (0.01, 1), (1, 1), (9, 9)])
def test_split_sizes(held_out: float, count: int) -> None:
    data = examples(10)
    train, test = split(data, held_out, seed=3)
    assert len(test) == count
    assert sorted(train + test, key=lambda e: e.line) == data
    assert train == sorted(train, key=lambda e: e.line)
    assert test == sorted(test, key=lambda e: e.line)


def test_split_is_the_same_everywhere_and_depends_on_the_seed() -> None:
    chosen = [[e.line for e in split(examples(20), 5, seed)[1]] for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] == [3, 4, 12, 14, 16]
    assert chosen[2] != chosen[0]


@pytest.mark.parametrize("held_out", [0, -1, 0.0, 1.0, 1.5, float("nan"), float("inf")])
def test_split_refuses_senseless_sizes(held_out: float) -> None:
    with pytest.raises(ConfigError, match="cannot hold out"):
        split(examples(4), held_out, 0)


def test_split_refuses_a_negative_seed() -> None:
    with pytest.raises(ConfigError, match="seed is -1"):
        split(examples(4), 1, -1)


@pytest.mark.parametrize(("n", "held_out"), [(4, 4), (4, 9), (1, 0.5), (0, 1), (2, 0.9)])
def test_split_leaves_something_on_both_sides(n: int, held_out: float) -> None:
    with pytest.raises(DataError, match="none is left"):
        split(examples(n), held_out, 0)


@pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="shared/data is not here")
def test_shared_data_reads() -> None:
    kinds = {p.name: read_jsonl(p)[0].kind for p in sorted((SHARED / "data").glob("*.jsonl"))}
    assert kinds["sst2.train.jsonl"] == kinds["agnews.valid.jsonl"] == "label"
    assert kinds["gsm8k.train.jsonl"] == "completion"
