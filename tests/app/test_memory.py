"""Amounts of memory as people write them."""

from __future__ import annotations

import pytest

from fwdllm.engine.errors import ConfigError
from fwdllm.resources import parse_bytes


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("1", 1),
        ("123456", 123456),
        ("1GiB", 2**30),
        ("1.5G", 3 * 2**29),
        ("900MB", 900_000_000),
        (" 2 kib ", 2048),
        ("0.5k", 512),
        ("7tb", 7 * 10**12),
        ("12B", 12),
    ],
)
def test_amounts(text: str, n_bytes: int) -> None:
    assert parse_bytes(text) == n_bytes


@pytest.mark.parametrize("text", ["", "G", "1X", "-1G", "1e9", "0", "0.1", "1 G B", "nan", "1.G"])
def test_what_is_not_an_amount(text: str) -> None:
    with pytest.raises(ConfigError, match=r'is like "1GiB"'):
        parse_bytes(text)
