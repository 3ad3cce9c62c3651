"""Numbers of JSON in bounds, as llama.cpp's grammars."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Digits before and after the point: a model that writes more has lost its way.
_MOST_DIGITS = 15
_DIGITS = f"[0-9]{{1,{_MOST_DIGITS}}}"


def integer(schema: Mapping[str, Any]) -> str:
    """Integers within a schema's bounds. Errors: ValueError for no bounds or no integers there."""
    low, high = _bounds(schema)
    return _within(low, high)


def number(schema: Mapping[str, Any]) -> str:
    """Numbers within a schema's bounds. Errors: ValueError for bounds that are not integers."""
    low, high = _bounds(schema)
    if low is None and high is None:
        whole = _within(None, None)
        return f'{whole} ("." {_DIGITS})? ([eE] [-+]? [0-9]{{1,2}})?'
    for name in ("exclusiveMinimum", "exclusiveMaximum"):
        if schema.get(name) is not None:
            raise ValueError(f"{name!r} is supported for integers only")
    for name in ("minimum", "maximum"):
        if schema.get(name) is not None and schema[name] != int(schema[name]):
            raise ValueError(f"{name!r} is supported only if it is an integer")
    parts = []
    if high is None or high > 0:  # of 0 or more: up to below the upper bound, and the bound itself
        least = max(low or 0, 0) if low is not None else 0
        if high is None or least < high:
            parts.append(f'{_positive(least, None if high is None else high - 1)} ("." {_DIGITS})?')
        if high is not None:
            parts.append(f'"{high}" ("." "0"{{1,{_MOST_DIGITS}}})?')
    if low is None or low < 0:
        least = max(-high, 0) if high is not None else 0
        if low is None or least < -low:
            most = None if low is None else -low - 1
            parts.append(f'"-" {_positive(least, most)} ("." {_DIGITS})?')
        if low is not None:
            parts.append(f'"{low}" ("." "0"{{1,{_MOST_DIGITS}}})?')
    if (low is None or low <= 0) and (high is not None and high == 0):
        parts.append('"0"')
    return "(" + " | ".join(parts) + ")"


def _bounds(schema: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """The least and the greatest integer, None where there is no bound, or one of too many digits.

    Such as those of JavaScript's safe integers, which zod puts into its schemas.
    """
    schema = {k: v for k, v in schema.items() if v is not None}
    for name in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
        value = schema.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{name!r} is not a number")
        if abs(value) >= 10**_MOST_DIGITS:
            if (value > 0) == name.endswith("inimum"):
                raise ValueError(f"{name!r} has more than {_MOST_DIGITS} digits")
            del schema[name]
    lows = [-((-schema[name]) // 1) for name in ("minimum",) if schema.get(name) is not None]
    highs = [schema[name] // 1 for name in ("maximum",) if schema.get(name) is not None]
    if schema.get("exclusiveMinimum") is not None:
        lows.append(schema["exclusiveMinimum"] // 1 + 1)
    if schema.get("exclusiveMaximum") is not None:
        highs.append(-((-schema["exclusiveMaximum"]) // 1) - 1)
    low = int(max(lows)) if lows else None
    high = int(min(highs)) if highs else None
    if low is not None and high is not None and low > high:
        raise ValueError("no number is within the bounds")
    return low, high


def _within(low: int | None, high: int | None) -> str:
    parts = []
    if high is None or high >= 0:
        parts.append(_positive(max(low or 0, 0), high))
    if low is None or low < 0:
        least = 1 if high is None or high >= 0 else -high
        parts.append(f'"-" {_positive(least, None if low is None else -low)}')
    return "(" + " | ".join(parts) + ")"


def _positive(low: int, high: int | None) -> str:
    """Integers from low to high, both 0 or more."""
    if high is None:
        n = len(str(low))
        same = _positive(low, 10**n - 1)
        longer = f" | [1-9] [0-9]{{{n},{_MOST_DIGITS - 1}}}" if n < _MOST_DIGITS else ""
        return f"({same}{longer})"
    parts = []
    for n in range(len(str(low)), len(str(high)) + 1):  # by the number of digits
        least = max(low, 10 ** (n - 1) if n > 1 else 0)
        parts.append(_same_length(str(least), str(min(high, 10**n - 1))))
    return "(" + " | ".join(parts) + ")"


def _same_length(low: str, high: str) -> str:
    """Texts of digits from low to high, all as long."""
    if low == high:
        return f'"{low}"'
    n = len(low) - 1
    if set(low[1:]) <= {"0"} and set(high[1:]) <= {"9"}:
        return f"[{low[0]}-{high[0]}]" + (f" [0-9]{{{n}}}" if n else "")
    if low[0] == high[0]:
        return f'"{low[0]}" {_same_length(low[1:], high[1:])}'
    parts = [f'"{low[0]}" ({_same_length(low[1:], "9" * n)})']
    if int(high[0]) - int(low[0]) > 1:
        parts.append(f"[{int(low[0]) + 1}-{int(high[0]) - 1}] [0-9]{{{n}}}")
    parts.append(f'"{high[0]}" ({_same_length("0" * n, high[1:])})')
    return "(" + " | ".join(parts) + ")"
