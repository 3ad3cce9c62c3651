"""Texts to classify: files with one on each line, plain or as JSON objects with a ``text``."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import count
from typing import BinaryIO

from fwdllm.engine.data.jsonl import BYTE_ORDER_MARK, Example
from fwdllm.engine.errors import DataError

STDIN = "-"
_MOST_BYTES = 16 * 2**20


def read_texts(path: str | os.PathLike[str]) -> Iterator[Example]:
    """The texts of a file, or with "-" of standard input, line by line; a blank line has text "".

    If the first line that is not blank begins with "{", every line is a JSON object with a field
    ``text``; others are ignored. Otherwise a line is a text itself, without its line end.
    Errors: DataError naming file and line.
    """
    name = "standard input" if path == STDIN else os.fspath(path)
    try:
        with nullcontext(sys.stdin.buffer) if path == STDIN else open(path, "rb") as file:
            yield from _texts(file, name)
    except IsADirectoryError:
        raise DataError(f"{name} is a folder; name the file in it") from None
    except (OSError, ValueError) as error:  # a ValueError for a NUL in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"cannot read {name!r}: {reason}") from error


def _texts(file: BinaryIO, name: str) -> Iterator[Example]:
    as_json: bool | None = None
    for line in count(1):
        where = f"{name}:{line}"
        raw = file.readline(_MOST_BYTES + 1)
        if not raw:
            return
        if len(raw) > _MOST_BYTES:
            raise DataError(f"{where}: the line has more than {_MOST_BYTES:,} bytes")
        if line == 1:
            raw = raw.removeprefix(BYTE_ORDER_MARK)
        if not raw.strip():
            yield Example(text="", line=line, path=name)
            continue
        if as_json is None:
            as_json = raw.lstrip().startswith(b"{")
        text = _field(raw, where) if as_json else _decoded(raw, where)
        yield Example(text=text, line=line, path=name)


def _decoded(raw: bytes, where: str) -> str:
    try:
        return raw.removesuffix(b"\n").removesuffix(b"\r").decode()
    except UnicodeDecodeError:
        raise DataError(f"{where}: it is not UTF-8 text") from None


def _field(raw: bytes, where: str) -> str:
    try:
        fields = json.loads(_decoded(raw, where))
    except (RecursionError, ValueError):
        raise DataError(
            f"{where}: it is not JSON; the first line begins an object, so each line must be one"
        ) from None
    text = fields.get("text") if isinstance(fields, dict) else None
    if not isinstance(text, str) or not text:
        raise DataError(f"{where}: it is no object with a text that is not empty")
    return text
