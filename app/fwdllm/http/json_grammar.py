"""JSON schemas to llama.cpp's grammars (GBNF): whatever a grammar allows is valid by the schema.

llama-cpp-python's own converter ignores what it does not know, so that answers look constrained
and are not. Here an unknown keyword is an error. A grammar may allow less than its schema:
properties come in the schema's order, and others only where the schema names none.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from fwdllm.http.limits import MAX_GRAMMAR_CHARACTERS
from fwdllm.http.number_grammar import integer, number
from fwdllm.http.pattern_grammar import any_character, literal, repeats, string_of

# Keywords that say nothing about which values are valid.
_NOTES = {
    "$comment", "$defs", "$id", "$schema", "default", "definitions", "deprecated", "description",
    "discriminator", "example", "examples", "readOnly", "title", "writeOnly",
}  # fmt: skip
_OF_TYPE = {
    "object": {"additionalProperties", "properties", "required"},
    "array": {"items", "maxItems", "minItems", "prefixItems"},
    "string": {"format", "maxLength", "minLength", "pattern"},
    "integer": {"exclusiveMaximum", "exclusiveMinimum", "maximum", "minimum"},
    "number": {"exclusiveMaximum", "exclusiveMinimum", "maximum", "minimum"},
    "boolean": set(),
    "null": set(),
}
# One of these decides alone; only notes and a type may stand beside it.
_DECIDING = ("$ref", "const", "enum", "anyOf", "oneOf", "allOf")
_MAX_DEPTH = 64
# Of types, "enum", "anyOf", "required" and the like.
_MAX_CHOICES = 1000
_MAX_ONE_OF = 64  # each is compared with each
# What may be written on the way to a grammar, which may have a quarter of it.
_MAX_WRITTEN = 4 * MAX_GRAMMAR_CHARACTERS

_HOUR = r"([01]\d|2[0-3])"
_DAYS = r"(0[1-9]|[12]\d)"
_DATE = rf"\d{{4}}-((0[13578]|1[02])-({_DAYS}|3[01])|(0[469]|11)-({_DAYS}|30)|02-{_DAYS})"
_TIME = rf"{_HOUR}:[0-5]\d:[0-5]\d(\.\d{{1,6}})?(Z|[+-]{_HOUR}:[0-5]\d)"
_BYTE = r"(25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
_LABEL = r"[a-z]([a-z0-9-]{0,30}[a-z0-9])?"
_FORMATS = {
    "date": f"^{_DATE}$",
    "time": f"^{_TIME}$",
    "date-time": f"^{_DATE}T{_TIME}$",
    "duration": r"^P(\d{1,6}W|\d{1,6}D(T\d{1,6}H)?|T\d{1,6}(H(\d{1,2}M)?|M(\d{1,2}S)?|S))$",
    "email": rf"^[A-Za-z0-9_+-]{{1,24}}(\.[A-Za-z0-9_+-]{{1,24}})?@{_LABEL}(\.{_LABEL}){{1,2}}$",
    "hostname": rf"^{_LABEL}(\.{_LABEL}){{0,3}}$",
    "ipv4": rf"^{_BYTE}(\.{_BYTE}){{3}}$",
    "ipv6": r"^[0-9a-f]{1,4}(:[0-9a-f]{1,4}){7}$",
    "uuid": r"^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$",
}


class SchemaError(ValueError):
    """A schema that is none, or has what is not supported.

    where: the path to it in the schema, such as "properties.name.pattern".
    """

    def __init__(self, message: str, where: str) -> None:
        super().__init__(f"{message} (at {where or 'the top'})")
        self.where = where


class Grammar:
    """Rules of a grammar, to which schemas are added."""

    def __init__(self) -> None:
        self._left = _MAX_WRITTEN
        self._rules: dict[str, str] = {"ws": '" "?', "char": any_character()}
        self._rules["string"] = r'"\"" char* "\""'
        self._rules["value"] = 'object | array | string | number | "true" | "false" | "null"'
        self._rules["number"] = number({})
        self._rules["array"] = '"[" ws (value ("," ws value)*)? "]"'
        self._rules["object"] = f'"{{" ws ({_pairs("value")})? "}}"'

    def text(self) -> str:
        """All rules. Errors: SchemaError if that is too long a grammar."""
        text = "\n".join(f"{name} ::= {rule}" for name, rule in self._rules.items())
        if len(text) > MAX_GRAMMAR_CHARACTERS:
            raise _too_long()
        return text

    def rule(self, expression: str, name: str = "") -> str:
        """Add a rule; returns its name."""
        self.write(expression)
        name = name or f"r{len(self._rules)}"
        self._rules[name] = expression
        return name

    def write(self, expression: str) -> str:
        """Count an expression, of any part of the grammar. SchemaError if that is too much."""
        self._left -= len(expression) + 1
        if self._left < 0:
            raise _too_long()
        return expression

    def schema(self, schema: Any) -> str:
        """Add rules for the values of a schema; returns the name of theirs. Errors: SchemaError."""
        return _Schema(self, schema).start()


def grammar_of(schema: Any) -> str:
    """The grammar of the JSON values of a schema. Errors: SchemaError."""
    grammar = Grammar()
    grammar.rule(grammar.schema(schema), "root")
    return grammar.text()


def _too_long() -> SchemaError:
    most = MAX_GRAMMAR_CHARACTERS
    return SchemaError(f"the grammar of the schema has over {most:,} characters", "")


class _Schema:
    """One whole schema, in which "$ref" looks; see ``Grammar``."""

    def __init__(self, grammar: Grammar, root: Any) -> None:
        self._grammar, self._root = grammar, root
        self._names: dict[str, str] = {}

    def start(self) -> str:
        return self._ref("#", "")

    def _ref(self, ref: Any, where: str) -> str:
        """The rule of what "#/..." names, which may hold itself."""
        if ref not in self._names:
            target = self._target(ref, where)
            self._names[ref] = self._grammar.rule("", f"ref{len(self._names)}")
            self._grammar.rule(self._value(target, where), self._names[ref])
        return self._names[ref]

    def _target(self, ref: Any, where: str) -> Any:
        if not (isinstance(ref, str) and (ref == "#" or ref.startswith("#/"))):
            raise SchemaError(f"the $ref {_short(ref)} is not within the schema", where)
        found = self._root
        for step in ref.split("/")[1:]:
            step = step.replace("~1", "/").replace("~0", "~")
            if isinstance(found, list) and step.isdigit() and int(step) < len(found):
                found = found[int(step)]
            elif isinstance(found, dict) and step in found:
                found = found[step]
            else:
                raise SchemaError(f"there is nothing at the $ref {_short(ref)}", where)
        return found

    def _value(self, schema: Any, where: str) -> str:
        """An expression for the values of a part of the schema, at the path ``where``."""
        return self._grammar.write(self._expression(schema, where))

    def _expression(self, schema: Any, where: str) -> str:
        if where.count(".") > _MAX_DEPTH:
            raise SchemaError(f"the schema is more than {_MAX_DEPTH} deep", "")
        if schema is True or schema == {}:
            return "value"
        if not isinstance(schema, dict):
            raise SchemaError(f"{_short(schema)} is no schema that has values", where)
        keys = {key for key in schema if key not in _NOTES}
        for key in _DECIDING:
            if key in keys:
                for other in sorted(keys - {key, "type"}):
                    raise SchemaError(f"{other!r} beside {key!r} is not supported", where)
                return self._decided(key, schema, where)
        for key in sorted(keys - {"type"}.union(*_OF_TYPE.values())):
            if schema[key] is not None and schema[key] is not False:
                raise SchemaError(f"the keyword {key!r} is not supported", _at(where, key))
        kinds = self._kinds(schema, where)
        return _any(self._of_kind(kind, schema, where) for kind in kinds)

    def _kinds(self, schema: Mapping[str, Any], where: str) -> list[str]:
        kinds: Any = schema.get("type")
        if kinds is None:  # those that the keywords are about
            kinds = [kind for kind, keys in _OF_TYPE.items() if keys & set(schema)]
            return [kind for kind in kinds if not (kind == "integer" and "number" in kinds)] or [
                "value"
            ]
        kinds = [kinds] if isinstance(kinds, str) else kinds
        if not _is_choice(kinds) or not all(isinstance(k, str) and k in _OF_TYPE for k in kinds):
            raise SchemaError(f"{_short(schema['type'])} is not a type", _at(where, "type"))
        return kinds

    def _of_kind(self, kind: str, schema: Mapping[str, Any], where: str) -> str:
        if kind == "object":
            return self._object(schema, where)
        if kind == "array":
            return self._array(schema, where)
        try:
            if kind == "string":
                return _string(schema)
            if kind in ("integer", "number"):
                return (integer if kind == "integer" else number)(schema)
        except (TypeError, ValueError) as error:
            raise SchemaError(str(error), where) from error
        return {"boolean": '("true" | "false")', "null": '"null"', "value": "value"}[kind]

    def _decided(self, key: str, schema: Mapping[str, Any], where: str) -> str:
        if key == "$ref":
            return self._ref(schema["$ref"], _at(where, "$ref"))
        values = [schema["const"]] if key == "const" else schema[key]
        if not _is_choice(values):
            text = f"{key!r} is not a list of something, or of over {_MAX_CHOICES:,}"
            raise SchemaError(text, _at(where, key))
        if key in ("const", "enum"):
            if "type" in schema:
                kinds = self._kinds(schema, where)
                values = [v for v in values if any(_is_a(kind, v) for kind in kinds)]
            if not values:
                raise SchemaError(f"no value of {key!r} has the type", where)
            return _any(literal(self._grammar.write(_json(value))) for value in values)
        if "type" in schema:
            raise SchemaError(f"'type' beside {key!r} is not supported", where)
        if key == "allOf" and len(values) > 1:
            raise SchemaError("'allOf' of several is not supported", _at(where, key))
        if key == "oneOf" and len(values) > _MAX_ONE_OF:
            text = f"'oneOf' of over {_MAX_ONE_OF} is not supported; 'anyOf' is"
            raise SchemaError(text, _at(where, key))
        if key == "oneOf" and not self._exclude_each_other(values, where):
            raise SchemaError(
                "'oneOf' is supported only where the types differ, or a required property's "
                "'const'; 'anyOf' is supported",
                _at(where, key),
            )
        rules = [self._value(v, _at(where, f"{key}.{i}")) for i, v in enumerate(values)]
        return _any(rules)

    def _exclude_each_other(self, schemas: list[Any], where: str) -> bool:
        found = [self._target(s["$ref"], where) if _is_ref(s) else s for s in schemas]
        if not all(isinstance(s, dict) for s in found):
            return False
        kinds = [{"number" if k == "integer" else k for k in _types(s)} for s in found]
        return all(
            (kinds[i] and kinds[k] and not kinds[i] & kinds[k]) or _tell_apart(found[i], found[k])
            for i in range(len(found))
            for k in range(i)
        )

    def _object(self, schema: Mapping[str, Any], where: str) -> str:
        properties = schema.get("properties", {})
        required = schema.get("required", [])
        others = schema.get("additionalProperties", not properties)
        if not isinstance(properties, dict) or not (required == [] or _is_choice(required)):
            raise SchemaError("'properties' or 'required' is malformed", where)
        for name in required:
            if not isinstance(name, str) or name not in properties:
                raise SchemaError(
                    f"{_short(name)} is required, but not in 'properties'", _at(where, "required")
                )
        if not properties:
            if others is False:
                return '"{" ws "}"'
            value = self._value(others, _at(where, "additionalProperties"))
            return f'"{{" ws ({_pairs(self._grammar.rule(value))})? "}}"'
        # From the last to the first: what may follow where a property came before, and where none.
        after = before = '""'
        for name, part in reversed(properties.items()):
            value = self._value(part, _at(where, f"properties.{name}"))
            pair = self._grammar.rule(f'{literal(_json(name))} ws ":" ws {value}')
            first = f"{pair} {after}"
            follows = f'"," ws {pair}'
            if name in required:
                before, after = first, f"{follows} {after}"
            else:
                before, after = f"({first} | {before})", f"({follows})? {after}"
            before, after = self._grammar.rule(before), self._grammar.rule(after)
        return f'"{{" ws {before} ws "}}"'

    def _array(self, schema: Mapping[str, Any], where: str) -> str:
        least, most = schema.get("minItems", 0), schema.get("maxItems")
        if not _is_count(least) or not (most is None or (_is_count(most) and most >= least)):
            raise SchemaError("'minItems' or 'maxItems' is malformed", where)
        first = schema.get("prefixItems", [])
        if not isinstance(first, list):
            raise SchemaError("'prefixItems' is not a list", where)
        if first:
            if least > len(first) or (most is not None and most < len(first)):
                raise SchemaError("'prefixItems' beside other counts is not supported", where)
            items = [
                self._value(item, _at(where, f"prefixItems.{i}")) for i, item in enumerate(first)
            ]
            return '"[" ws ' + ' "," ws '.join(items) + ' ws "]"'
        item = self._grammar.rule(self._value(schema.get("items", True), _at(where, "items")))
        if most == 0:
            return '"[" ws "]"'
        try:
            more = repeats(max(least - 1, 0), None if most is None else most - 1)
        except ValueError as error:
            raise SchemaError(str(error), where) from error
        several = f'{item} ("," ws {item}){more}'
        return f'"[" ws ({several}){"" if least else "?"} ws "]"'


def _string(schema: Mapping[str, Any]) -> str:
    given = {key for key in _OF_TYPE["string"] if schema.get(key) is not None}
    if not given:
        return "string"
    if "format" in given:
        if given != {"format"}:
            raise ValueError("'format' beside 'pattern' or a length is not supported")
        if schema["format"] not in _FORMATS:
            raise ValueError(
                f"the format {schema['format']!r} is not supported; {', '.join(_FORMATS)} are"
            )
        return rf'"\"" ({string_of(_FORMATS[schema["format"]])}) "\""'
    if "pattern" in given:
        if given != {"pattern"}:
            raise ValueError("'pattern' beside a length is not supported")
        if not isinstance(schema["pattern"], str):
            raise ValueError("'pattern' is not a text")
        return rf'"\"" ({string_of(schema["pattern"])}) "\""'
    least, most = schema.get("minLength") or 0, schema.get("maxLength")
    if not _is_count(least) or not (most is None or (_is_count(most) and most >= least)):
        raise ValueError("'minLength' or 'maxLength' is malformed")
    return rf'"\"" char{repeats(least, most)} "\""' if most != 0 else r'"\"\""'


def _pairs(value: str) -> str:
    pair = f'string ws ":" ws {value}'
    return f'{pair} ("," ws {pair})*'


def _any(expressions: Iterable[str]) -> str:
    found = list(dict.fromkeys(expressions))
    return found[0] if len(found) == 1 else "(" + " | ".join(found) + ")"


def _types(schema: Mapping[str, Any]) -> list[str]:
    kinds: Any = schema.get("type", [])
    return [kinds] if isinstance(kinds, str) else list(kinds)


def _tell_apart(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether a property that both objects need has other values in each."""
    for name in set(one.get("required", [])) & set(other.get("required", [])):
        here, there = (_constants(s.get("properties", {}).get(name)) for s in (one, other))
        if here and there and not here & there:
            return True
    return False


def _constants(schema: Any) -> set[str]:
    if not isinstance(schema, dict):
        return set()
    values = [schema["const"]] if "const" in schema else schema.get("enum", [])
    return {_json(value) for value in values}


def _is_choice(values: Any) -> bool:
    return isinstance(values, list) and 0 < len(values) <= _MAX_CHOICES


def _is_ref(schema: Any) -> bool:
    return isinstance(schema, dict) and "$ref" in schema


def _is_a(kind: str, value: Any) -> bool:
    if isinstance(value, bool) or value is None:
        return kind == ("null" if value is None else "boolean")
    types = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float)}
    return kind in types and isinstance(value, types[kind])  # type: ignore[arg-type]


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _at(where: str, step: str) -> str:
    return f"{where}.{step}" if where else step


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _short(value: Any) -> str:
    text = _json(value)
    return text if len(text) <= 40 else text[:40] + "..."
