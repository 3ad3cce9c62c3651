"""Changed training data: read, put into a chat template and cut into tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import sources
from changes import change_bytes, change_json
from gguf_bytes import ARRAY, STRING, text
from gguf_parts import of_strings, read_parts
from target import Row, Target, refused_or_ok

from fwdllm.demo import asset

_CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
_TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
_ROWS: list[Any] = [
    *sources.ROWS, *sources.CHATS, *sources.LABELLED, {"text": "a b c"},
    {"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "a"},
     {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"},
     {"role": "assistant", "content": "d", "weight": 0}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]},
     {"role": "assistant", "content": None, "tool_calls": [_CALL]},
     {"role": "tool", "tool_call_id": "c1", "content": "1"},
     {"role": "assistant", "content": "d"}], "tools": [_TOOL]},
    {"prompt": [{"role": "user", "content": "a"}],
     "completion": [{"role": "assistant", "content": "b"}]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    {"instruction": "a", "input": "b", "output": "c"},
]  # fmt: skip
_KNOWN = ["role", "content", "user", "assistant", "system", "tool", "messages", "text", "label",
    "prompt", "completion", "tools", "tool_calls", _CALL, _TOOL, "weight", "name"]  # fmt: skip
# Those whose regular expressions once recursed with each letter, and some of the most usual.
_SPLITTERS = ("tekken", "deepseek-llm", "deepseek-v3", "gpt-4o", "llama-bpe", "qwen2", "default")
_UNITS = ["a", "A", "1", " ", "\n", "ß", "語", "😀", "'s", "aB", "-", "\u0301", "a\u0301", "\u2028"]


def _make(folder: Path) -> None:
    import fwdllm.engine.engine  # noqa: F401

    for name in _SPLITTERS:
        parts = read_parts(asset("fwdllm-tiny.gguf"))
        parts.put(b"tokenizer.ggml.model", STRING, text("gpt2"))
        parts.put(b"tokenizer.ggml.pre", STRING, text(name))
        parts.put(b"tokenizer.ggml.merges", ARRAY, of_strings([b"a b"]))
        (folder / f"{name}.gguf").write_bytes(parts.content())


def _write(random: Random, folder: Path, case: Path) -> str:
    if random.random() < 0.1:
        long = random.choice(_UNITS) * random.choice([100, 5_000, 50_000, 200_000])
        rows = [{"text": long}, {"prompt": long, "completion": "b"}]
        (case / "data.jsonl").write_text(json.dumps(random.choice(rows)) + "\n")
        (case / "splitter").write_text(random.choice(_SPLITTERS))
        return "long words"
    lines = []
    for row in random.choices(_ROWS, k=random.choice([1, 1, 1, 2])):
        if random.random() < 0.8:
            row = change_json(row, random, _KNOWN)
        lines.append(json.dumps(row, ensure_ascii=random.random() < 0.5))
    content = "\n".join(lines).encode(errors="surrogatepass") + b"\n"
    kind = "values"
    if random.random() < 0.3:
        kind = "bytes"
        content = change_bytes(content, random, [b"\r\n", b"\xef\xbb\xbf", b"\x1f\x8b", b"\\u0000"])
    (case / "data.jsonl").write_bytes(content)
    return kind


@contextmanager
def _open(folder: Path) -> Iterator[Any]:
    from fwdllm.engine.data.tokenizer import Tokenizer
    from fwdllm.engine.engine import Engine

    engine = Engine.load(asset("fwdllm-tiny.gguf"))
    yield engine, {n: Tokenizer.open(folder / f"{n}.gguf") for n in _SPLITTERS}


def _check(opened: Any, case: Path) -> list[Row]:
    from fwdllm.engine.data.jsonl import read_jsonl

    engine, tokenizers = opened
    splitter = case / "splitter"

    def encode() -> None:
        examples = read_jsonl(case / "data.jsonl")
        engine.encode(engine.separate(examples), 16)
        engine.encode(examples)

    rows = [refused_or_ok("encode", encode)]
    if splitter.exists():
        tokenizer = tokenizers[splitter.read_text()]
        row = json.loads((case / "data.jsonl").read_text())
        text = row.get("text", row.get("prompt"))
        rows.append(refused_or_ok("split", lambda: tokenizer.encode(text, bos=False)))
    return rows


JSONL = Target(_make, _write, _check, _open)
