"""Tokenizers and chat templates, against vocabularies of all the usual kinds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from gguf import GGUFWriter, TokenType
from places import SHARED

from fwdllm.engine.data.tokenizer import Tokenizer
from fwdllm.engine.errors import DataError, ModelError

MODELS = SHARED / "models"
TEXTS = ["Hello world", "Hello  world!\n\tnaïve 😀 x", " lead", "a\0b", "", "x" * 3000]
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]

BOS, END, TURN = 0, 1, 2
SPECIAL = ["<s>", "<|im_end|>", "<|im_start|>"]


def byte_symbols() -> list[str]:
    """GPT-2's printable names of the 256 bytes, in byte order."""
    keep = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in keep else next(others)) for byte in range(256)]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write a byte-level vocabulary with three special tokens."""

    def write(
        template: str | None = None, add_bos: bool = True, n_layers: int = 1, **changes: list
    ) -> Path:
        fields = {
            "tokens": [*SPECIAL, *byte_symbols(), "he"],
            "token_type": [TokenType.CONTROL] * 3 + [TokenType.NORMAL] * 257,
            "merges": ["h e"],
            **changes,
        }
        writer = GGUFWriter(tmp_path / "vocabulary.gguf", "llama")
        writer.add_block_count(n_layers)
        writer.add_context_length(64)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        for name, values in fields.items():
            writer.add_array(f"tokenizer.ggml.{name}", values)
        writer.add_bos_token_id(BOS)
        writer.add_eos_token_id(END)
        writer.add_add_bos_token(add_bos)
        if template is not None:
            writer.add_chat_template(template)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        return tmp_path / "vocabulary.gguf"

    return write


def open_shared(name: str) -> Tokenizer:
    path = MODELS / f"{name}.gguf"
    if not path.exists():
        pytest.skip("the shared vocabularies are not here")
    return Tokenizer.open(path)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("name", ["ggml-vocab-gpt-2", "ggml-vocab-llama-spm", "tinymix-6m.Q4_0"])
def test_text_comes_back(name: str, bos: bool, text: str) -> None:
    tokenizer = open_shared(name)
    ids = tokenizer.encode(text, bos)
    assert tokenizer.decode(ids) == text
    assert (ids[:1] == [tokenizer.bos]) == (bos and tokenizer.add_bos)


def test_pieces_are_the_text(write: Callable[..., Path]) -> None:
    tokenizer = Tokenizer.open(write())
    text = "he said: 😀 \xff"
    pieces = [tokenizer.piece(token) for token in tokenizer.encode(text, bos=True)]
    assert b"".join(pieces).decode() == text
    assert pieces[:3] == [b"", b"he", b" "]


@pytest.mark.parametrize("name", ["ggml-vocab-bert-bge", "minilm-l6-v2.Q4_0"])
def test_bert_gets_its_special_tokens(name: str) -> None:
    tokenizer = open_shared(name)
    assert tokenizer.encode("Hello, world", bos=True) == [101, 7592, 1010, 2088, 102]
    assert tokenizer.encode("Hello, world", bos=False) == [7592, 1010, 2088]
    assert tokenizer.decode([101, 7592, 1010, 2088, 102]) == "hello, world"
    assert tokenizer.bos == 101


def test_flags_and_ids(write: Callable[..., Path]) -> None:
    tokenizer = Tokenizer.open(write())
    assert (tokenizer.bos, tokenizer.eos, tokenizer.n_vocab) == (BOS, END, 260)
    assert (tokenizer.add_bos, tokenizer.add_eos) == (True, False)
    assert tokenizer.is_end(END)
    assert not tokenizer.is_end(50)
    without = Tokenizer.open(write(add_bos=False))
    assert not without.add_bos
    assert without.encode("he", bos=True) == [259]
    assert tokenizer.encode("he", bos=True) == [BOS, 259]


def test_special_tokens_only_when_asked(write: Callable[..., Path]) -> None:
    tokenizer = Tokenizer.open(write())
    text = "he<|im_end|>"
    assert tokenizer.encode(text, bos=False, special=True) == [259, END]
    plain = tokenizer.encode(text, bos=False)
    assert END not in plain
    assert tokenizer.decode(plain) == text
    assert tokenizer.decode([BOS, 259, END]) == "he"
    assert tokenizer.decode([BOS, 259, END], special=True) == "<s>he<|im_end|>"


def test_text_that_is_not_unicode(write: Callable[..., Path]) -> None:
    tokenizer = Tokenizer.open(write())
    assert tokenizer.decode(tokenizer.encode("a\ud800b", bos=False)) == "a?b"
    half = tokenizer.encode("😀", bos=False)[:2]
    assert tokenizer.decode(half) == "\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("token", [-1, 260, 2**31, 2**63])
def test_ids_out_of_range(write: Callable[..., Path], token: int) -> None:
    tokenizer = Tokenizer.open(write())
    for use in (lambda: tokenizer.decode([5, token]), lambda: tokenizer.piece(token)):
        with pytest.raises(DataError, match="vocabulary has 260"):
            use()
    with pytest.raises(DataError):
        tokenizer.is_end(token)


CHATML = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"


def test_chatml_without_a_template(write: Callable[..., Path]) -> None:
    tokenizer = Tokenizer.open(write())
    assert tokenizer.chat.render(MESSAGES, add_generation_prompt=False) == CHATML
    rendered = tokenizer.chat.render(MESSAGES, add_generation_prompt=True)
    assert rendered == CHATML + "<|im_start|>assistant\n"
    ids = tokenizer.encode_chat(MESSAGES)
    assert ids[:2] == [BOS, TURN]
    assert ids.count(TURN) == 3
    assert tokenizer.decode(ids, special=True) == "<s>" + rendered


TEMPLATE = (
    "{{ bos_token }}{%- for m in messages %}\n"
    "[{{ m.role }}] {{ m['content'] | trim }}{{ eos_token }}\n"
    "{%- endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def test_template_of_the_file(write: Callable[..., Path]) -> None:
    tokenizer = Tokenizer.open(write(TEMPLATE))
    wanted = "<s>[system] Be brief.<|im_end|>[user] Hi<|im_end|>"
    assert tokenizer.chat.render(MESSAGES, add_generation_prompt=False) == wanted
    assert tokenizer.chat.render(MESSAGES, add_generation_prompt=True) == wanted + "[assistant]"
    ids = tokenizer.encode_chat(MESSAGES)
    assert ids.count(BOS) == 1  # from the template, not a second time
    assert tokenizer.decode(ids, special=True) == wanted + "[assistant]"


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}",
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0].content.x.y }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ 1 / 0 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_template_that_fails_or_leaves_the_sandbox(
    write: Callable[..., Path], template: str
) -> None:
    tokenizer = Tokenizer.open(write(template))
    with pytest.raises(ModelError, match="chat template"):
        tokenizer.chat.render(MESSAGES, add_generation_prompt=True)


# All of these end the process or read out of bounds if llama.cpp gets them.
@pytest.mark.parametrize(
    "changes",
    [
        {"tokens": [*SPECIAL, *byte_symbols(), "!"]},
        {"tokens": [1, 2]},
        {"token_type": [TokenType.NORMAL] * 3},
        {"token_type": [1.0] * 260},
        {"scores": [0.0]},
        {"merges": [1]},
        {"n_layers": 513},
    ],
)
def test_vocabulary_that_is_damaged(write: Callable[..., Path], changes: dict) -> None:
    with pytest.raises(ModelError):
        Tokenizer.open(write(**changes))


def test_files_that_are_no_model(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.gguf").write_bytes(b"not a model")
    writer = GGUFWriter(tmp_path / "empty.gguf", "llama")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    for name in ("text.gguf", "empty.gguf", "missing.gguf", "a\0b"):
        with pytest.raises(ModelError):
            Tokenizer.open(tmp_path / name)
    assert capfd.readouterr() == ("", "")
