"""Text to token ids and back, and chat templates, all as llama.cpp does for the same file."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from fwdllm.engine.data.chat import CHATML, ChatTemplate
from fwdllm.engine.data.messages import Message
from fwdllm.engine.errors import DataError
from fwdllm.engine.llamacpp.native import NativeModel, llama_cpp, open_model, tokenize

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
        Errors: TextError for a text, ModelError for a vocabulary that llama.cpp cannot use.
        """
        return tokenize(self._vocab, text.encode("utf-8", "replace"), bos, special)

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

    @cached_property
    def chat(self) -> ChatTemplate:
        """The file's chat template, or ChatML without one."""
        source = self._model.file.string("tokenizer.chat_template", CHATML)
        return ChatTemplate(
            source, self._text(self.bos), self._text(self.eos), self._model.file.path
        )

    def encode_prompt(self, text: str) -> list[int]:
        """The token ids of a text to be continued, in which names of special tokens are those.

        BOS comes first if the model wants it, and never twice; nothing comes behind the text.
        """
        return self.with_bos(self.encode(text, bos=False, special=True))

    def encode_chat(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> list[int]:
        """The token ids of a conversation and the opening of the assistant's turn."""
        return self.encode_prompt(self.chat.render(messages, True, tools))

    def with_bos(self, ids: list[int]) -> list[int]:
        """The ids, with BOS in front if the model wants it and it is not there."""
        if not self.add_bos or self.bos is None or ids[:1] == [self.bos]:
            return ids
        return [self.bos, *ids]

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
