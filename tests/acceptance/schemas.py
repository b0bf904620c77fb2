"""Realistic schemas for `constrained_answers`; together they use everything that a grammar can express."""

from __future__ import annotations

from typing import Any

Json = dict[str, Any]


def _of(properties: Json, required: list[str] | None = None, **more: Any) -> Json:
    """Returns an object schema; all properties are required unless `required` is given."""
    return {"type": "object", "properties": properties, "required": required or list(properties), **more}


def _or_null(kind: str, **more: Any) -> Json:
    return {"type": [kind, "null"], **more}


def _list(items: Json, **more: Any) -> Json:
    return {"type": "array", "items": items, **more}


TEXT: Json = {"type": "string"}
SHORT: Json = {"type": "string", "maxLength": 12}
MONEY: Json = {"type": "number", "minimum": 0, "maximum": 99999}

SCHEMAS: dict[str, Json] = {
    "flat": _of({"invoice_number": SHORT, "date": SHORT, "total": SHORT}),
    "fields or null, none required": {
        "type": "object",
        "properties": {name: _or_null("string") for name in ("name", "street", "city", "phone", "account")},
    },
    "forty fields": _of({f"box_{i}": _or_null("string", maxLength=8) for i in range(1, 41)}),
    "nested": _of({"seller": _of({"name": SHORT, "address": _of({"lines": _list(SHORT, maxItems=2), "zip": SHORT})})}),
    "eight levels": _of({"a": _of({"b": _of({"c": _of({"d": _of({"e": _of({"f": _of({"g": SHORT})})})})})})}),
    "items": _of(
        {
            "items": _list(
                _of({"text": SHORT, "quantity": {"type": "integer", "minimum": 1, "maximum": 999}, "price": MONEY}),
                minItems=1,
                maxItems=4,
            )
        }
    ),
    "any number of items": _of({"items": _list(_of({"text": TEXT, "price": _or_null("number")}, ["text"]))}),
    "matrix": _of({"rows": _list(_list({"type": "integer"}, minItems=2, maxItems=2), maxItems=3)}),
    "pair": _of(
        {
            "point": {
                "type": "array",
                "prefixItems": [{"type": "number"}, {"enum": ["mm", "cm", "in"]}],
                "items": False,
                "minItems": 2,
            }
        }
    ),
    "enum": _of(
        {"currency": {"enum": ["EUR", "USD", "CHF", "JPY", None]}, "state": {"enum": ["paid", "paid in part"]}}
    ),
    "enum of all kinds": _of({"value": {"enum": [1, "1", 1.5, True, None, [1, "a"], {"k": []}]}}),
    "patterns": _of(
        {
            "number": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4,6}$"},
            "iban": {"type": "string", "pattern": "^[A-Z]{2}[0-9]{2}( [0-9]{4}){3,5}$"},
            "zip": {"type": "string", "pattern": r"^\d{5}(-\d{4})?$"},
            "version": {"type": "string", "pattern": r"^v(0|[1-9]\d?)\.(alpha|beta|rc)?$"},
        }
    ),
    "formats": _of(
        {
            "day": {"type": "string", "format": "date"},
            "at": {"type": "string", "format": "date-time"},
            "mail": {"type": "string", "format": "email", "maxLength": 30},
            "id": {"type": "string", "format": "uuid"},
            "host": {"type": "string", "format": "ipv4"},
        }
    ),
    "optional": _of({"a": SHORT, "b": {"type": "integer"}, "c": {"type": "boolean"}, "d": SHORT}, ["c"]),
    "ranges": _of(
        {
            "percent": {"type": "number", "exclusiveMinimum": 0, "maximum": 100},
            "below_zero": {"type": "integer", "minimum": -40, "exclusiveMaximum": 0},
            "even": {"type": "integer", "multipleOf": 2, "minimum": 0, "maximum": 1000},
            "any": {"type": "number"},
        }
    ),
    "unicode": _of(
        {
            "größe": SHORT,
            "金額": {"enum": ["￥1,000", "無料", "e\u0301té", "🧾 Beleg"]},
            "Имя": _or_null("string", maxLength=6),
            "سعر": {"type": "boolean"},
        }
    ),
    "odd keys": _of(
        {"": {"type": "boolean"}, 'a "b" \\ c/d': SHORT, "$ref": {"type": "null"}, "x.y[0]": {"const": "<nl>"}}
    ),
    "references": {
        "$defs": {
            "money": _of({"amount": MONEY, "currency": {"enum": ["EUR", "USD"]}}),
            "party": _of({"name": SHORT, "balance": {"anyOf": [{"$ref": "#/$defs/money"}, {"type": "null"}]}}),
        },
        **_of({"from": {"$ref": "#/$defs/party"}, "to": {"$ref": "#/$defs/party"}}),
    },
    "tree": {
        "$defs": {"node": _of({"title": SHORT, "parts": _list({"$ref": "#/$defs/node"}, maxItems=2)}, ["title"])},
        "$ref": "#/$defs/node",
    },
    "as pydantic writes it": {
        "$defs": {
            "Line": _of(
                {"text": {"title": "Text", **SHORT}, "net": {"title": "Net", "anyOf": [MONEY, {"type": "null"}]}},
                ["text"],
                title="Line",
            )
        },
        **_of(
            {
                "kind": {"const": "receipt", "title": "Kind", "type": "string"},
                "lines": {"title": "Lines", "items": {"$ref": "#/$defs/Line"}, "type": "array", "maxItems": 3},
                "note": {"anyOf": [SHORT, {"type": "null"}], "default": None, "title": "Note"},
            },
            ["kind", "lines"],
            title="Receipt",
            description="What a till prints.",
        ),
    },
    "one of three": {
        "anyOf": [
            _of({"kind": {"const": "card"}, "last_four": {"type": "string", "pattern": "^[0-9]{4}$"}}),
            _of({"kind": {"const": "cash"}, "change": MONEY}),
            _of({"kind": {"const": "none"}}),
        ]
    },
    "exactly one": _of(
        {
            "shape": {
                "oneOf": [
                    _of({"kind": {"const": "circle"}, "r": {"type": "integer"}}),
                    _of({"kind": {"const": "box"}, "sides": _list({"type": "integer"}, minItems=2, maxItems=2)}),
                ]
            }
        }
    ),
    "all of": {"allOf": [_of({"id": {"type": "integer", "minimum": 0}}), _of({"open": {"type": "boolean"}})]},
    "map": _of({"scores": {"type": "object", "additionalProperties": {"type": "integer"}}}),
    "map by pattern": {
        "type": "object",
        "patternProperties": {"^Q[1-4]$": _or_null("number")},
        "additionalProperties": False,
    },
    "a list at the top": _list(_of({"name": SHORT, "here": {"type": "boolean"}}), maxItems=5),
    "lengths": _of(
        {
            "code": {"type": "string", "minLength": 3, "maxLength": 3},
            "long": {"type": "string", "minLength": 40, "maxLength": 80},
            "empty": {"type": "string", "maxLength": 0},
        }
    ),
    "several types": _of({"value": {"type": ["integer", "boolean", "null", "string"], "maxLength": 6}}),
    "draft 7": {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "definitions": {"day": {"type": "string", "pattern": "^[0-3][0-9]\\.[01][0-9]\\.$"}},
        **_of({"from": {"$ref": "#/definitions/day"}, "to": {"$ref": "#/definitions/day"}}),
    },
    "anything": {"type": "object"},
}

_NUMBERS = ("row", "col", "colspan", "rowspan")
_TABLE = _of({
    "dimensions": _of(
        {key: {"type": "integer", "minimum": 0} for key in ("rows", "columns", "header_rows", "total_rows")},
        additionalProperties=False,
    ),
    "cells": _list(
        _of(
            {
                **{key: {"type": "integer", "minimum": 1} for key in _NUMBERS},
                "type": {"enum": ["header", "data"]},
                "header_level": {"type": "integer", "minimum": 0},
                "content": TEXT,
            },
            additionalProperties=False,
        )
    ),
}, additionalProperties=False)  # fmt: skip
CELLS: Json = {"anyOf": [_TABLE, _list(_TABLE)]}  # answers to tables_json
