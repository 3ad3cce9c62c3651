"""Text to token ids and back, and chat templates, all as llama.cpp does for the same file."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping, Sequence
from typing import Any

from fwdllm.engine.errors import DataError, ModelError
from fwdllm.engine.llamacpp.native import NativeModel, llama_cpp, open_model

Message = Mapping[str, Any]

# What llama.cpp uses for a model without a template.
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_WORDPIECE = 3  # LLAMA_VOCAB_TYPE_WPM in llama.h
_PIECE_BYTES = 64


class Tokenizer:
    """The vocabulary of a GGUF file.

    bos, eos: token ids, or None if the vocabulary has none.  add_bos, add_eos: whether the
    model wants them around a text.  n_vocab: ids are 0 .. n_vocab - 1.
    """

    def __init__(self, model: NativeModel) -> None:
        self._model = model
        self._vocab = model.vocab
        self.n_vocab: int = llama_cpp.llama_vocab_n_tokens(self._vocab)
        self.bos = self._token(llama_cpp.llama_vocab_bos(self._vocab))
        self.eos = self._token(llama_cpp.llama_vocab_eos(self._vocab))
        self.add_bos = bool(llama_cpp.llama_vocab_get_add_bos(self._vocab))
        self.add_eos = bool(llama_cpp.llama_vocab_get_add_eos(self._vocab))
        self._formatters: dict[bool, Any] = {}

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Open the vocabulary of a GGUF file, without its weights.

        Errors: ModelError if the file is missing, damaged or has no usable vocabulary.
        """
        return cls(open_model(path, vocab_only=True))

    def encode(self, text: str, bos: bool, special: bool = False) -> list[int]:
        """The token ids of a text; lone surrogates in it become "?".

        bos: also add what the model wants around a whole text: BOS if ``add_bos``, EOS if
        ``add_eos``, and [CLS] and [SEP] for BERT.  special: whether the names of special
        tokens in the text, such as "<|im_end|>", are those tokens; otherwise they are text.
        """
        raw = text.encode("utf-8", "replace")
        # One token per byte and the two around them suffice, except where a normalizer of the
        # vocabulary makes the text longer; then llama.cpp says how many.
        size = len(raw) + 2
        for _ in range(2):
            buffer = (llama_cpp.llama_token * size)()
            n = llama_cpp.llama_tokenize(self._vocab, raw, len(raw), buffer, size, bos, special)
            if n >= 0:
                return buffer[:n]
            size = -n
        raise DataError(f"a text of {len(raw)} bytes is too long for llama.cpp's tokenizer")

    def decode(self, ids: Sequence[int], special: bool = False) -> str:
        """The text of token ids; a BOS in front is left out.

        special: whether special tokens appear by name; otherwise they are left out.
        Bytes that are not UTF-8 become U+FFFD. Errors: DataError for an id out of range.
        """
        ids = list(ids)
        if ids and ids[0] == self.bos and not special:
            ids = ids[1:]
        self._check(ids)
        tokens = (llama_cpp.llama_token * len(ids))(*ids)
        size = _PIECE_BYTES * len(ids)
        for _ in range(2):
            buffer = ctypes.create_string_buffer(max(1, size))
            n = llama_cpp.llama_detokenize(
                self._vocab, tokens, len(ids), buffer, size, False, special
            )
            if n >= 0:
                break
            size = -n
        text = buffer.raw[:n].decode("utf-8", "replace")
        # WordPiece marks the start of every word, the first one too.
        wordpiece = llama_cpp.llama_vocab_type(self._vocab) == _WORDPIECE
        return text[1:] if wordpiece and text.startswith(" ") else text

    def piece(self, token: int) -> bytes:
        """The bytes one generated token adds to a text, a leading space included.

        They may be part of a UTF-8 character; a special token has none.
        Errors: DataError for an id out of range.
        """
        self._check([token])
        size = _PIECE_BYTES
        for _ in range(2):
            buffer = ctypes.create_string_buffer(size)
            n = llama_cpp.llama_token_to_piece(self._vocab, token, buffer, size, 0, False)
            if n >= 0:
                break
            size = -n
        return buffer.raw[:n]

    def is_end(self, token: int) -> bool:
        """Whether a model that generates this token has finished."""
        self._check([token])
        return bool(llama_cpp.llama_vocab_is_eog(self._vocab, token))

    def encode_prompt(self, text: str) -> list[int]:
        """The token ids of a text that is to be continued, special tokens by their names.

        In front is the BOS that the model wants, not twice; there is no end token behind, which
        would end the text before it is continued.
        """
        ids = self.encode(text, bos=False, special=True)
        if self.add_bos and self.bos is not None and ids[:1] != [self.bos]:
            return [self.bos, *ids]
        return ids

    def render_chat(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The text of a conversation by the file's chat template, or ChatML without one.

        messages: {"role": ..., "content": ...}.  add_generation_prompt: whether to end with
        the opening of the assistant's turn.  tools: in OpenAI's format. The template is a program
        from the file; it runs in Jinja's sandbox. Errors: ModelError if it fails or refuses the
        messages.
        """
        try:
            formatter = self.formatter(add_generation_prompt)
            expected = [_as_templates_expect(message) for message in messages]
            return str(formatter(messages=expected, tools=tools).prompt)
        except Exception as error:  # a foreign program can raise anything
            raise ModelError(
                f"the chat template of {self._model.file.path} fails on these messages: {error}"
            ) from error

    def encode_chat(self, messages: Sequence[Message], add_generation_prompt: bool) -> list[int]:
        """The token ids of a conversation, see ``render_chat``; never with BOS twice."""
        text = self.render_chat(messages, add_generation_prompt)
        if add_generation_prompt:
            return self.encode_prompt(text)
        return self.encode(text, bos=not self.has_bos(text), special=True)

    def has_bos(self, text: str) -> bool:
        """Whether a rendered conversation starts with BOS already."""
        bos_text = self._text(self.bos)
        return bool(bos_text) and text.startswith(bos_text)

    def formatter(self, add_generation_prompt: bool) -> Any:
        """llama-cpp-python's Jinja2ChatFormatter of the file's template; see ``render_chat``."""
        # Kept, because compiling a template takes longer than rendering a conversation.
        if add_generation_prompt not in self._formatters:
            formatter = llama_cpp.llama_chat_format.Jinja2ChatFormatter
            self._formatters[add_generation_prompt] = formatter(
                self._model.file.string("tokenizer.chat_template", CHATML),
                eos_token=self._text(self.eos),
                bos_token=self._text(self.bos),
                add_generation_prompt=add_generation_prompt,
            )
        return self._formatters[add_generation_prompt]

    def _token(self, token: int) -> int | None:
        return token if 0 <= token < self.n_vocab else None

    def _text(self, token: int | None) -> str:
        if token is None:
            return ""
        text: bytes = llama_cpp.llama_vocab_get_text(self._vocab, token)
        return text.decode("utf-8", "replace")

    def _check(self, ids: Sequence[int]) -> None:
        # llama.cpp ends the process on an id it does not have.
        for token in ids:
            if not 0 <= token < self.n_vocab:
                raise DataError(f"there is no token {token}; the vocabulary has {self.n_vocab}")


def _as_templates_expect(message: Message) -> dict[str, str]:
    """OpenAI's newer name of the system's role is one that templates do not know."""
    return {**message, "role": "system"} if message.get("role") == "developer" else dict(message)
