"""``fwdllm classify``: texts and files of lines in, a label for each out, in any number."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_runs import MODEL, Cli, write_rows

from fwdllm import classify
from fwdllm.engine.adapters.io import save_gguf
from fwdllm.engine.data.lines import read_texts
from fwdllm.engine.engine import Engine
from fwdllm.engine.settings import LoRAConfig

TEXTS = ["a wonderful film", "dull and far too long", "😀 so\tso"]
LABELS = ("not\tso\ngood", "very good")


@pytest.fixture(scope="module")
def model(shared: Path) -> Path:
    return shared / "models" / "minilm-l6-v2.Q4_0.gguf"


@pytest.fixture(scope="module")
def adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    engine = Engine.load(model, LoRAConfig(2), labels=LABELS)
    assert engine.adapter is not None
    theta = engine.adapter.theta
    theta += np.random.default_rng(1).normal(0, 0.05, theta.size).astype(np.float32)
    path = tmp_path_factory.mktemp("adapter") / "a.gguf"
    save_gguf(engine.adapter, path)
    return path


def plain(model: Path, adapter: Path, *texts: str) -> str:
    """What the command prints for texts; "" is a blank line."""
    found = classify(model, [text for text in texts if text], adapter=adapter)
    names = {LABELS[0]: "not\\tso\\ngood", LABELS[1]: "very good"}
    rows = []
    for text in texts:
        one = next(found) if text else None
        rows.append(f"{names[one.label]}\t{one.probability:.4f}\n" if one else "\n")
    return "".join(rows)


def test_texts_are_arguments(fwdllm: Cli, model: Path, adapter: Path) -> None:
    outcome = fwdllm("classify", model, *TEXTS, "--adapter", adapter)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out == plain(model, adapter, *TEXTS)
    assert len(set(outcome.out.splitlines())) == 3
    outcome = fwdllm("classify", model, *TEXTS, "--adapter", adapter, "--json")
    rows = [json.loads(row) for row in outcome.out.splitlines()]
    wanted = list(classify(model, TEXTS, adapter=adapter))
    assert rows == [
        {
            "file": None,
            "line": line,
            "label": one.label,
            "probability": one.probability,
            "probabilities": dict(zip(one.labels, one.probabilities, strict=True)),
        }
        for line, one in enumerate(wanted, 1)
    ]


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ("\ufeff" + "\n".join(TEXTS), TEXTS),
        ("one\r\ntwo \r\n\r\n  \nthree\n\n", ["one", "two ", "", "", "three", ""]),
        ("nul \0 inside\n\u2028 and \x0b\x0c\x85 are no line ends\n",
         ["nul \0 inside", "\u2028 and \x0b\x0c\x85 are no line ends"]),
        ('\n{"text": "one", "id": 5}\n\n{"label": "ignored", "text": "two\\n2"}\n',
         ["", "one", "", "two\n2"]),
        ('\ufeff{"text": "one"}\r\n', ["one"]),
        ('[1]\n{"text": "this is plain"}\n', ["[1]", '{"text": "this is plain"}']),
        ("", []),
        ("w" * 100_000, ["w" * 100_000]),
    ],
)  # fmt: skip
def test_files_have_a_text_on_each_line(
    fwdllm: Cli, model: Path, adapter: Path, tmp_path: Path, content: str, texts: list[str]
) -> None:
    """A result is on the line of its text."""
    file = tmp_path / "lines"
    file.write_bytes(content.encode())
    assert [example.text for example in read_texts(file)] == texts
    limit = ("--max-tokens", 512) if len(content) > 1000 else ()
    outcome = fwdllm("classify", model, "--adapter", adapter, "--file", file, *limit)
    assert (outcome.code, outcome.err) == (0, "")
    if not limit:
        assert outcome.out == plain(model, adapter, *texts)
    outcome = fwdllm("classify", model, "--adapter", adapter, "-f", file, "--json", *limit)
    rows = [json.loads(row) for row in outcome.out.splitlines()]
    numbers = [line for line, text in enumerate(texts, 1) if text]
    assert [(row["file"], row["line"]) for row in rows] == [(str(file), n) for n in numbers]


def test_many_lines_of_several_files_and_of_standard_input(
    fwdllm: Cli, model: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than are in memory at a time."""
    file = write_rows(tmp_path / "a.jsonl", [{"text": f"number {i}"} for i in range(150)])
    stdin = io.TextIOWrapper(io.BytesIO(b"x\n\ny"))
    monkeypatch.setattr(sys, "stdin", stdin)
    outcome = fwdllm("classify", model, "--adapter", adapter, "-f", file, "-f", "-")
    texts = [*(f"number {i}" for i in range(150)), "x", "", "y"]
    assert outcome.out == plain(model, adapter, *texts)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"one\ntwo\n\xff\xfe\nfour", "3: it is not UTF-8 text"),
        (b'{"text": "one"}\n{"text": "two"}\nthree\n', "3: it is not JSON"),
        (b'{"text": "one"}\n{"text": "two"}\n{"text": ""}\n', "3: it is no object with a text"),
        (b'{"text": "one"}\n{"text": "two"}\n{"prompt": "x"}\n', "3: it is no object with a text"),
        (b'{"text": "one"}\n{"text": "two"}\n["text"]\n', "3: it is no object with a text"),
        (b'{"text": "one"}\n{"text": "two"}\n{"text": "\\ud800"}\n', "3: the text cannot be"),
        (b'{"text": "one"}\n{"text": "two"}\n' + b"[" * 100_000, "3: it is not JSON"),
        (b"one\ntwo\n" + b"word " * 600, "3: the example has 602 tokens"),
        (b"one\ntwo\n" + b"x" * (2**24 + 1), "3: the line has more than 16,777,216 bytes"),
    ],
)
def test_a_bad_line_is_named_after_the_results_of_those_before(
    fwdllm: Cli, model: Path, adapter: Path, tmp_path: Path, content: bytes, said: str
) -> None:
    file = tmp_path / "lines"
    file.write_bytes(content)
    outcome = fwdllm("classify", model, "--adapter", adapter, "--file", file)
    assert (outcome.code, outcome.out) == (2, plain(model, adapter, "one", "two"))
    assert outcome.err.startswith(f"fwdllm: {file}:{said}")
    assert outcome.err.count("\n") == 1


def test_a_decoder_chooses_from_the_labels_that_are_given(fwdllm: Cli) -> None:
    labels = ["yes", "no", "well, so so"]
    options = [option for label in labels for option in ("--label", label)]
    outcome = fwdllm("classify", MODEL, "The cow is big.", *options, "--json")
    [found] = classify(MODEL, ["The cow is big."], labels=labels)
    assert outcome.json["probabilities"] == dict(
        zip(found.labels, found.probabilities, strict=True)
    )


def test_what_cannot_be_classified_is_one_sentence(
    fwdllm: Cli, model: Path, adapter: Path, tmp_path: Path
) -> None:
    def said(*arguments: Any) -> str:
        outcome = fwdllm("classify", *arguments)
        assert (outcome.code, outcome.out) == (2, "")
        return " ".join(outcome.err.split())

    file = tmp_path / "lines"
    file.write_text('{"text": "x"}\n')
    of_encoder = (model, "--adapter", adapter)
    assert "give texts to classify" in said(*of_encoder)
    assert "give texts to classify" in said(*of_encoder, "x", "-f", file)
    assert said(*of_encoder, "x", file).endswith(f"the file {file}, say --file {file}")
    assert said(*of_encoder, "-").endswith("standard input, say --file -")
    assert "there is no text" in said(*of_encoder, "")
    assert "cannot read" in said(*of_encoder, "-f", tmp_path / "none")
    assert "is a folder" in said(*of_encoder, "-f", tmp_path)
    assert "its own labels" in said(*of_encoder, "x", "--label", "a", "--label", "b")
    assert "needs an adapter with a head" in said(model, "x")
    assert "no labels of its own" in said(MODEL, "x")
    assert "two or more labels" in said(MODEL, "x", "--label", "a", "--label", "a")
    for limit in (1, 0, -1):
        for command in (["classify", *of_encoder, "x"], ["eval", MODEL, file]):
            outcome = fwdllm(*command, "--max-tokens", limit)
            assert (outcome.code, outcome.out) == (2, "")
            assert f"at least 2, not {limit}" in outcome.err
    ours = (MODEL, "x", "--label", "a", "--label", "b", "--max-tokens", 2)
    assert "text:1: 2 tokens leave none for the text" in said(*ours)
    assert "is for 'bert' models" in said(MODEL, "x", "--adapter", adapter)
    engine = Engine.load(MODEL, LoRAConfig(2))
    assert engine.adapter is not None
    save_gguf(engine.adapter, tmp_path / "decoder.gguf")
    assert "is for 'llama' models" in said(model, "x", "--adapter", tmp_path / "decoder.gguf")
