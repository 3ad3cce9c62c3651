"""Regular expressions to llama.cpp's grammars, as the text of a JSON string."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any

if sys.version_info >= (3, 11):
    from re import _constants as sre  # type: ignore[attr-defined]
    from re import _parser as parser  # type: ignore[attr-defined]
else:
    import sre_constants as sre
    import sre_parse as parser

Ranges = list[tuple[int, int]]

# llama.cpp's own bound, of repeats and of what they make together, is 2000.
MAX_REPEATS = 1000
MAX_NESTED_REPEATS = 1999
_MAX_PATTERN = 4096
_LAST = 0x10FFFF
_SURROGATES = (0xD800, 0xDFFF)
# Characters that a JSON string can hold only in another form; those with one of two characters.
_SHORT = dict(zip(b'"\\\b\f\n\r\t', '"\\bfnrt', strict=True))
_ESCAPED = sorted({*range(0x20), *_SHORT})
_BEGINS = (sre.AT_BEGINNING, sre.AT_BEGINNING_STRING)
_ENDS = (sre.AT_END, sre.AT_END_STRING)
_DIGIT, _LINE_ENDS = [(48, 57)], [(10, 10), (13, 13), (0x2028, 0x2029)]
_WORD = [(48, 57), (65, 90), (95, 95), (97, 122)]
_SPACE = [(9, 13), (32, 32), (160, 160), (0xFEFF, 0xFEFF)]
# As in ECMA-262, which JSON Schema refers to: digits and words are of ASCII.
_CATEGORIES = {
    sre.CATEGORY_DIGIT: _DIGIT,
    sre.CATEGORY_WORD: _WORD,
    sre.CATEGORY_SPACE: _SPACE,
}
_NOT_CATEGORIES = {
    sre.CATEGORY_NOT_DIGIT: _DIGIT,
    sre.CATEGORY_NOT_WORD: _WORD,
    sre.CATEGORY_NOT_SPACE: _SPACE,
}


def string_of(pattern: str) -> str:
    """A grammar's expression for the inside of a JSON string that the pattern is found in.

    As in JSON Schema, a pattern without ^ and $ may be anywhere in the string.
    Errors: ValueError for what is no pattern, or one with assertions, references or flags.
    """
    if len(pattern) > _MAX_PATTERN:
        raise ValueError(f"a pattern of {len(pattern):,} characters, over {_MAX_PATTERN:,}")
    try:
        parsed: Any = parser.parse(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"the pattern {pattern!r} is not a regular expression: {error}") from error
    if parsed.state.flags & ~re.UNICODE.value:
        raise ValueError(f"the pattern {pattern!r} has flags, which are not supported")
    try:
        return _whole(list(parsed))
    except _Unsupported as error:
        raise ValueError(f"the pattern {pattern!r} has {error}, which is not supported") from error


def literal(text: str) -> str:
    """A grammar's expression for exactly this text."""
    return '"' + "".join(map(_in_grammar, map(ord, text))) + '"'


def any_character() -> str:
    """A grammar's expression for a character of a JSON string, written as its shortest form."""
    return _class([(0, _LAST)])


class _Unsupported(Exception):
    pass


def _whole(items: Sequence[Any], begun: bool = False, ended: bool = False) -> str:
    """begun, ended: whether an anchor before or after the items holds them there."""
    items = list(items)
    if items and items[0][0] is sre.AT and items[0][1] in _BEGINS:
        begun, items = True, items[1:]
    if items and items[-1][0] is sre.AT and items[-1][1] in _ENDS:
        ended, items = True, items[:-1]
    if len(items) == 1 and items[0][0] is sre.BRANCH:  # anchors may be within the branches
        return " | ".join(_whole(branch, begun, ended) for branch in items[0][1][1])
    anything = f"{any_character()}*"
    return " ".join([*[anything][begun:], _sequence(items), *[anything][ended:]])


def _sequence(items: Iterable[Any], times: int = 1) -> str:
    """times: how often the sequence is repeated."""
    return " ".join(_item(kind, value, times) for kind, value in items) or '""'


def _item(kind: Any, value: Any, times: int) -> str:
    if kind is sre.LITERAL:
        return _class([(value, value)])
    if kind is sre.NOT_LITERAL:
        return _class(_without([(value, value)]))
    if kind is sre.ANY:
        return _class(_without(_LINE_ENDS))
    if kind is sre.IN:
        return _class(_set(value))
    if kind is sre.BRANCH:
        return "(" + " | ".join(_sequence(branch, times) for branch in value[1]) + ")"
    if kind is sre.SUBPATTERN:
        if value[1] or value[2]:
            raise _Unsupported("flags")
        return f"({_sequence(value[3], times)})"
    if kind in (sre.MAX_REPEAT, sre.MIN_REPEAT):  # both find the same strings
        least, most, items = value
        suffix = repeats(least, None if most is sre.MAXREPEAT else most)
        times *= max(least, 1 if most is sre.MAXREPEAT else most, 1)
        if times > MAX_NESTED_REPEATS:
            text = f"repeats within repeats, over {MAX_NESTED_REPEATS} in all, are not supported"
            raise ValueError(text)
        return f"({_sequence(items, times)}){suffix}"
    names = {
        sre.AT: "an anchor within",
        sre.ASSERT: "a look-around",
        sre.ASSERT_NOT: "a look-around",
        sre.GROUPREF: "a reference to a group",
    }
    raise _Unsupported(names.get(kind, str(kind).lower()))


def repeats(least: int, most: int | None) -> str:
    """A grammar's suffix for a number of repeats. Errors: ValueError for one that is too large."""
    if max(least, most or 0) > MAX_REPEATS:
        raise ValueError(f"more than {MAX_REPEATS} repeats are not supported")
    if (least, most) in ((0, None), (1, None), (0, 1)):
        return {(0, None): "*", (1, None): "+", (0, 1): "?"}[least, most]
    return f"{{{least},{'' if most is None else most}}}"


def _set(items: Sequence[Any]) -> Ranges:
    ranges: Ranges = []
    negated = False
    for kind, value in items:
        if kind is sre.NEGATE:
            negated = True
        elif kind is sre.LITERAL:
            ranges.append((value, value))
        elif kind is sre.RANGE:
            ranges.append(value)
        elif value in _NOT_CATEGORIES:
            ranges += _without(_NOT_CATEGORIES[value])
        else:
            ranges += _CATEGORIES[value]
    return _without(ranges) if negated else ranges


def _without(ranges: Ranges) -> Ranges:
    """All other characters."""
    found, start = [], 0
    for low, high in sorted(ranges):
        if low > start:
            found.append((start, low - 1))
        start = max(start, high + 1)
    return [*found, (start, _LAST)] if start <= _LAST else found


def _class(ranges: Ranges) -> str:
    """One of these characters, each in the form that JSON has for it."""
    outside = [*_without(ranges), *((c, c) for c in _ESCAPED), _SURROGATES]
    plain = "".join(
        _in_class(low) if low == high else f"{_in_class(low)}-{_in_class(high)}"
        for low, high in _without(outside)
    )
    escaped = [c for c in _ESCAPED if any(low <= c <= high for low, high in ranges)]
    # Few alternatives, as llama.cpp follows all of them at each token.
    forms = {"": "".join(_in_class(ord(_SHORT[c])) for c in escaped if c in _SHORT)}
    for c in escaped:
        if c not in _SHORT:
            first = f"u00{c >> 4:x}"
            forms[first] = forms.get(first, "") + f"{c & 15:x}"
    behind = [f"{first and literal(first)} [{last}]" for first, last in forms.items() if last]
    found = [f"[{plain}]"] if plain else []
    if behind:
        found.append(f"{literal(chr(92))} ({' | '.join(behind)})")
    if not found:
        raise _Unsupported("a set of no characters")
    return "(" + " | ".join(found) + ")"


def _in_grammar(code: int) -> str:
    if 0x20 <= code < 0x7F and code not in b'"\\':
        return chr(code)
    return f"\\x{code:02X}" if code < 0x80 else f"\\U{code:08X}"


def _in_class(code: int) -> str:
    if chr(code).isascii() and chr(code).isalnum():
        return chr(code)
    return f"\\x{code:02X}" if code < 0x80 else f"\\U{code:08X}"
