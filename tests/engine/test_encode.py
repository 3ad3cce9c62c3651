"""Examples to tokens: what is predicted, what is cut, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from fwdllm.bench.shapes import Shape
from fwdllm.bench.synthetic import make_decoder
from fwdllm.engine import Engine, Example
from fwdllm.engine.data.encode import Encoding, encode_decoder, encode_label
from fwdllm.engine.data.tokenizer import Tokenizer
from fwdllm.engine.errors import DataError
from fwdllm.kernels.types import QuantType


@pytest.fixture(scope="module")
def tokenizer(bundled: Path) -> Tokenizer:
    return Tokenizer.open(bundled)


def predicted(tokenizer: Tokenizer, example: Example, max_tokens: int | None = None) -> str:
    tokens = encode_decoder(tokenizer, example, 512, max_tokens)
    ids = [i for i, label in zip(tokens.ids, tokens.labels, strict=True) if label]
    return tokenizer.decode(ids, special=True)


def test_a_completion_is_predicted_up_to_its_end(tokenizer: Tokenizer) -> None:
    example = Example(prompt="Question: What does a cow say?\nAnswer:", completion=" Moo.")
    assert predicted(tokenizer, example) == " Moo.<|endoftext|>"
    tokens = encode_decoder(tokenizer, example, 512, None)
    assert tokens.ids[0] == tokenizer.bos
    prompt = tokenizer.encode(example.prompt or "", bos=True)
    assert tokens.ids[: len(prompt)] == prompt  # what inference would see


def test_a_text_is_predicted_whole(tokenizer: Tokenizer) -> None:
    assert predicted(tokenizer, Example(text="The cat sat.")).endswith("The cat sat.")


MESSAGES = [
    {"role": "user", "content": "What does a cow say?"},
    {"role": "assistant", "content": "Moo."},
    {"role": "user", "content": "And a cat?"},
    {"role": "assistant", "content": "Meow."},
]


def test_only_the_assistant_is_predicted(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"  # it has no template, so ChatML is used
    make_decoder(path, Shape(1, 64, 2, 1, 32, 64, 2048), QuantType.F16)
    tokenizer = Tokenizer.open(path)
    example = Example(messages=MESSAGES)
    assert predicted(tokenizer, example) == "Moo.<|im_end|>\nMeow.<|im_end|>\n"
    tokens = encode_decoder(tokenizer, example, 512, None)
    assert tokens.ids.count(tokenizer.bos or 0) == 1
    whole = tokenizer.chat.render(MESSAGES, add_generation_prompt=False)
    assert tokenizer.decode(tokens.ids) == whole


def test_one_turn_by_the_template_of_the_file(tokenizer: Tokenizer) -> None:
    assert predicted(tokenizer, Example(messages=MESSAGES[:2])) == " Moo.<|endoftext|>"


def test_a_template_that_rewrites_earlier_turns(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"chats.jsonl:3: .* renders earlier turns differently"):
        encode_decoder(tokenizer, Example(messages=MESSAGES, path="chats.jsonl", line=3), 512, None)


def test_a_long_prompt_loses_its_beginning(tokenizer: Tokenizer) -> None:
    example = Example(prompt="one two three " * 40 + "last words", completion=" the answer")
    tokens = encode_decoder(tokenizer, example, 512, 20)
    assert len(tokens.ids) == 20
    assert "last words the answer" in tokenizer.decode(tokens.ids)
    long_answer = Example(prompt="one two three " * 40, completion=" the answer is" * 40)
    assert sum(encode_decoder(tokenizer, long_answer, 512, 20).labels) == 10


def test_the_text_is_cut_before_its_label(tokenizer: Tokenizer) -> None:
    example = Example(text="a very good film " * 50, label="positive")
    tokens = encode_label(tokenizer, example, "positive", "", 512, 30)
    assert len(tokens.ids) == 30
    assert tokenizer.decode(tokens.ids).endswith("\nLabel: positive")
    assert tokens.labels[-1]
    assert not tokens.labels[0]


def test_longer_than_the_context(tokenizer: Tokenizer) -> None:
    example = Example(text="a very good film " * 500, path="data.jsonl", line=7)
    with pytest.raises(DataError, match=r"data.jsonl:7: the example has \d+ tokens"):
        encode_decoder(tokenizer, example, 512, None)
    assert len(encode_decoder(tokenizer, example, 512, 4000).ids) == 512


def test_every_completion_of_the_demo_is_predicted(bundled: Path) -> None:
    engine = Engine.load(bundled)
    example = Example(prompt="Question: Hi?\nAnswer:", completion=" Arr!")
    batch = engine.encode([example, Example(text="The cat sat."), example])
    assert batch.label_sequence.tolist() == sorted(batch.label_sequence.tolist())
    assert set(batch.label_sequence.tolist()) == {0, 1, 2}
    assert (batch.ids[batch.label_rows + 1] == batch.label_ids).all()


def test_sequences_are_kept_while_there_is_room(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoding = Encoding(tokenizer, 512, False, ())
    one, other = (Example(text=f"The cat sat on mat {i} all day.") for i in "ab")
    tokens = encoding.example(one, None)
    assert encoding.example(one, None) is tokens
    assert len(encoding.example(one, 4).ids) == 4
    assert encoding.example(one, None) is tokens
    monkeypatch.setattr("fwdllm.engine.data.encode._MOST_KEPT", len(tokens.ids) + 4)
    assert encoding.example(other, None).ids != tokens.ids
    assert encoding.example(one, None) is not tokens
    assert encoding.example(one, None).ids == tokens.ids
