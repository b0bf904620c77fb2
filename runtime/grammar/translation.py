"""Translates a JSON Schema of any draft into one that llguidance enforces as closely as it can.

The result refers only to its own '$defs'. What llguidance cannot enforce is left out with a warning: there the grammar
is wider than the schema, and answers are validated afterwards. What the schema leaves open is narrowed as the prompt
asks: objects have the properties that their schema names and no others, unless it mentions others, and a property that
may be null is always present. Whatever remains after narrowing is still an instance of the schema.
"""

from __future__ import annotations

from typing import Any

from granite4v.runtime.grammar import keywords as of
from granite4v.runtime.grammar.alternatives import are_disjoint
from granite4v.runtime.grammar.json_schema import (
    REFERENCES,
    JsonSchema,
    Resolved,
)
from granite4v.runtime.grammar.leaves import (
    NUMBER_KEYWORDS,
    PATTERN_KEYWORDS,
    STRING_KEYWORDS,
    Impossible,
    Leaf,
    is_exact,
    number_leaf,
    string_leaf,
    wider,
)
from granite4v.runtime.grammar.left_out import LeftOut
from granite4v.runtime.grammar.objects import Place, add_object, closing
from granite4v.runtime.grammar.trial import Trials
from granite4v.runtime.grammar.validation import Validator

Schema = dict[str, Any]

_MAX_WARNINGS = 20
_MAX_NESTING = 20  # of schemas within one entry of '$defs': llguidance parses at most 128 levels of JSON


class Translation:
    """The translation of one schema: `made` is the schema for llguidance; `fields` maps the id of each schema in it to
    its place in an answer."""

    def __init__(self, schema: JsonSchema, trials: Trials, *, close_ranges: bool = True) -> None:
        """`close_ranges`: add the numbers that are missing from llguidance's ranges. Raises Impossible."""
        self.schema, self.trials, self.close_ranges = schema, trials, close_ranges
        self._names: dict[tuple[int, bool], str] = {}
        self._waiting: list[tuple[str, Resolved, str, bool]] = []  # targets of references, still to be translated
        self._takes_null: dict[int, bool] = {}
        self._left_out: dict[LeftOut, list[str]] = {}
        self.defs: dict[str, Any] = {}
        self.fields: dict[int, str] = {}
        self.n_merged_patterns = 0  # patterns that llguidance has to intersect
        self._patterns: list[tuple[Schema, str]] = []
        self._one_ofs: list[tuple[Schema, str]] = []
        self.impossible: list[str] = []  # parts that no value satisfies; answers can do without them
        root = self._translated(schema.root, "$", False, 0)
        if root is False:
            raise Impossible("it allows no value", "$")
        self.made: Schema = {} if root is True else root
        self.made["$defs"] = self.defs
        while self._waiting:
            name, found, field, merged = self._waiting.pop(0)
            try:
                self.defs[name] = self._translated(found, field, merged, 0)
            except Impossible as problem:
                self.defs[name] = False
                self.impossible.append(str(problem))
        for made, field in self._one_ofs:
            self._choose_any(made, field)

    def leave_out(self, left_out: LeftOut, field: str) -> None:
        self._left_out.setdefault(left_out, []).append(field)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is left out: one sentence for each keyword and reason."""
        warnings = [left_out.warning(fields) for left_out, fields in self._left_out.items()]
        n_more = len(warnings) - _MAX_WARNINGS
        return (*warnings[:_MAX_WARNINGS], *([f"{n_more} more warnings are not shown."] if n_more > 0 else []))

    def leave_out_patterns(self) -> None:
        for made, field in self._patterns:
            found = [key for key in PATTERN_KEYWORDS if made.pop(key, None) is not None]
            if found:
                keyword = "multipleOf" if found == ["multipleOf"] else "pattern"
                reason = "cannot be enforced during generation together with the others"
                self.leave_out(LeftOut(f"'{keyword}'", reason), field)

    def _choose_any(self, made: Schema, field: str) -> None:
        """Replaces 'oneOf' with 'anyOf'.

        llguidance accepts 'oneOf' only for alternatives that it can prove mutually exclusive.
        """
        if not are_disjoint(made["oneOf"], self.defs):
            reason = "is enforced as 'anyOf', as several alternatives can be true"
            self.leave_out(LeftOut("'oneOf'", reason), field)
        items = list(made.items())
        made.clear()
        for key, value in items:
            if key != "oneOf":
                made[key] = value
            elif not any(other == "anyOf" for other, _ in items):
                made["anyOf"] = value
        if made.get("anyOf") is not dict(items)["oneOf"]:
            made["allOf"] = [*made.get("allOf", []), {"anyOf": dict(items)["oneOf"]}]

    # --- one schema ---

    def _translated(self, found: Resolved, field: str, merged: bool, nesting: int) -> Any:
        """Translates one schema.

        `merged`: other schemas apply to the same value, so what this one leaves open has to stay open.
        """
        node = found.node
        if not isinstance(node, dict):
            return node
        if self.schema.ignores_siblings and "$ref" in node:
            node = {"$ref": node["$ref"]}
        if node.get("not") in ({}, True) and "not" in self.schema.dialect.VALIDATORS:
            return False
        if of.restrictions(node) == ["allOf"] and len(node["allOf"]) == 1:
            return self._inner(found, node["allOf"][0], field, merged, nesting)
        place = Place(found, node, field, merged or of.merges(node), nesting)
        try:
            made = self._parts(place)
        except Impossible as problem:
            raise problem.at(field) from None
        self.fields[id(made)] = field
        return made

    def _parts(self, place: Place) -> Schema:
        node, kinds = place.node, of.kinds(place.node)
        made: Schema = {}
        if kinds is not None:
            made["type"] = kinds[0] if len(kinds) == 1 else kinds
        constants = [node["const"]] if "const" in node else node.get("enum")
        if constants is not None:
            self._add_constants(made, constants, place)
        else:
            if kinds is None or "integer" in kinds or "number" in kinds:
                integral = kinds is not None and "number" not in kinds
                self._add_leaf(made, self._number(node, integral=integral), place)
            if kinds is None or "string" in kinds:
                self._add_leaf(made, string_leaf(of.only(node, STRING_KEYWORDS), self.trials), place)
        if kinds is None or "array" in kinds:
            self._add_array(made, place)
        if kinds is None or "object" in kinds:
            add_object(self, made, place)
        self._add_combinations(made, place)
        for keyword in of.CHECKED_AFTERWARDS:
            if keyword in self.schema.dialect.VALIDATORS and of.has_effect(keyword, node) and keyword not in place.held:
                shown = "if/then/else" if keyword == "if" else keyword
                self.leave_out(LeftOut(f"'{shown}'"), place.field)
        made = {key: made[key] for key in (*node, *made) if key in made}  # the order of the author's keywords
        if "oneOf" in made:
            self._one_ofs.append((made, place.field))
        if place.has_patterns:
            self._patterns.append((made, place.field))
            self.n_merged_patterns += place.merged
        return made

    def _inner(self, found: Resolved, node: Any, field: str, merged: bool, nesting: int) -> Any:
        inner = self.schema.inside(node, found.resolver)
        if nesting >= _MAX_NESTING and isinstance(node, dict):
            return self._reference(inner, field, merged)
        return self._translated(inner, field, merged, nesting + 1)

    def part(self, place: Place, node: Any, suffix: str = "", merged: bool = False) -> Any:
        """Translates a subschema. Parts of a merged schema count as merged themselves."""
        merged = merged or place.merged
        return self._inner(place.found, node, place.field + suffix, merged, place.nesting)

    def _reference(self, target: Resolved, field: str, merged: bool) -> Any:
        if not isinstance(target.node, dict):
            return target.node
        key = (id(target.node), merged)
        name = self._names.get(key)
        if name is None:
            name = self._names[key] = f"s{len(self._names)}"
            self._waiting.append((name, target, field, merged))
        return {"$ref": f"#/$defs/{name}"}

    def follow(self, found: Resolved, node: Schema, key: str) -> Resolved:
        return self.schema.follow(node[key], found.resolver)

    # --- one value ---

    def _add_leaf(self, made: Schema, leaf: Leaf, place: Place) -> None:
        for left_out in leaf.left_out:
            self.leave_out(left_out, place.field)
        made |= {**leaf.made, **({"allOf": [*made["allOf"], *leaf.made.get("allOf", [])]} if "allOf" in made else {})}
        place.has_patterns |= any(key in leaf.made for key in PATTERN_KEYWORDS)

    def _number(self, node: Schema, *, integral: bool) -> Leaf:
        numbers = of.only(node, NUMBER_KEYWORDS)
        return number_leaf(numbers, self.trials, integral=integral, close_ranges=self.close_ranges)

    def _add_constants(self, made: Schema, constants: list[Any], place: Place) -> None:
        """Adds the constants that the keywords next to them allow."""
        others = of.only(place.node, (*NUMBER_KEYWORDS, *STRING_KEYWORDS, "type"))
        if others:
            alone = Validator(JsonSchema(others, self.schema.dialect))
            constants = [value for value in constants if alone.problem(value) is None]
        if not constants:
            raise Impossible("none of its values is allowed by the keywords beside them")
        made.pop("type", None)
        inexact = [value for value in constants if not is_exact(value)]
        if not inexact:
            made["enum"] = constants
            return
        keyword = "const" if "const" in place.node else "enum"
        self.leave_out(LeftOut(f"'{keyword}'", "has numbers too large to be enforced"), place.field)
        choices = [wider(value) for value in inexact]
        exact = [value for value in constants if is_exact(value)]
        made["allOf"] = [{"anyOf": [*([{"enum": exact}] if exact else []), *of.distinct(choices)]}]

    # --- arrays ---

    def _add_array(self, made: Schema, place: Place) -> None:
        node = place.node
        first = node.get("prefixItems", node["items"] if isinstance(node.get("items"), list) else [])
        others = node.get("additionalItems" if isinstance(node.get("items"), list) else "items")
        if others is None and node.get("unevaluatedItems") is False and not of.combines(node):
            others = False
            place.held.add("unevaluatedItems")
        if first:
            made["prefixItems"] = [self.part(place, inner, f"[{i}]") for i, inner in enumerate(first)]
        if others is not None:
            made["items"] = self.part(place, others, "[*]")
        for name in ("minItems", "maxItems"):
            if name in node:
                made[name] = int(min(node[name], 10**9))
        if "contains" in self.schema.dialect.VALIDATORS and of.has_effect("contains", node):
            made["minItems"] = max(made.get("minItems", 0), int(min(node.get("minContains", 1), 10**9)))
        if node.get("uniqueItems") is True and not first and isinstance(made.get("items"), dict):
            values = self._values(self.schema.inside(others, place.found.resolver))
            if values is not None:
                made["maxItems"] = min(made.get("maxItems", len(values)), len(values))
        if made.get("minItems", 0) > made.get("maxItems", 10**9):
            raise Impossible("no list has its minItems and its maxItems at once")

    def _values(self, found: Resolved) -> list[Any] | None:
        """The values that a schema enumerates; None if it enumerates none."""
        while isinstance(found.node, dict) and isinstance(found.node.get("$ref"), str) and "enum" not in found.node:
            found = self.follow(found, found.node, "$ref")
        return found.node.get("enum") if isinstance(found.node, dict) else None

    def shared(self, made: Any) -> Any:
        """Moves a schema that is used several times to '$defs' and returns a reference to it."""
        if not isinstance(made, dict) or "$ref" in made:
            return made
        name = f"s{len(self._names)}"
        self._names[(id(made), False)] = name
        self.defs[name] = made
        return {"$ref": f"#/$defs/{name}"}

    # --- several schemas of one value ---

    def _add_combinations(self, made: Schema, place: Place) -> None:
        node = place.node
        if "anyOf" in node:
            made["anyOf"] = of.distinct(self._possible(place, node["anyOf"]))
        if "oneOf" in node:
            made["oneOf"] = self._possible(place, node["oneOf"])
        for key in ("anyOf", "oneOf"):
            if key in made:
                made[key] = _with_discriminator(made[key], node.get("discriminator"))
        merged = [self.part(place, inner) for inner in node.get("allOf", [])] + closing(self, place)
        if merged:
            made["allOf"] = [*made.get("allOf", []), *merged]
        for key in REFERENCES:
            if isinstance(node.get(key), str):
                reference = self._reference(self.follow(place.found, node, key), place.field, place.merged)
                if isinstance(reference, dict) and "$ref" not in made:
                    made.update(reference)
                else:
                    made["allOf"] = [*made.get("allOf", []), reference]

    def _possible(self, place: Place, alternatives: list[Any]) -> list[Any]:
        """Translates the alternatives that some value satisfies. Raises Impossible if there are none."""
        made: list[Any] = []
        why = Impossible("none of its alternatives is possible")
        for inner in alternatives:
            try:
                made.append(self.part(place, inner))
            except Impossible as problem:
                why = problem
        if not made:
            raise why
        return made

    def accepts_null(self, found: Resolved) -> bool:
        """Whether null is certainly an instance."""
        node = found.node
        if not isinstance(node, dict):
            return node is True
        if id(node) not in self._takes_null:
            self._takes_null[id(node)] = self._decides_null(found, node)
        return self._takes_null[id(node)]

    def _decides_null(self, found: Resolved, node: Schema) -> bool:
        if self.schema.ignores_siblings and "$ref" in node:
            node = {"$ref": node["$ref"]}
        if node.get("not") in ({}, True) and "not" in self.schema.dialect.VALIDATORS:
            return False
        checks: list[bool] = []
        if "type" in node:
            kinds = node["type"]
            checks.append("null" in kinds if isinstance(kinds, list) else kinds in ("null", "any"))
        if "enum" in node:
            checks.append(None in node["enum"])
        if "const" in node:
            checks.append(node["const"] is None)
        for key, decide in (("anyOf", any), ("oneOf", any), ("allOf", all)):
            if key in node:
                inner = [self.accepts_null(self.schema.inside(one, found.resolver)) for one in node[key]]
                checks.append(decide(inner))
        if isinstance(node.get("$ref"), str):
            checks.append(self.accepts_null(self.follow(found, node, "$ref")))
        return all(checks) and not any(key in node for key in ("not", "if", "$dynamicRef", "$recursiveRef"))


def _with_discriminator(alternatives: list[Any], discriminator: Any) -> list[Any]:
    """Requires the property that tells the alternatives apart, as unions in OpenAPI and pydantic do."""
    name = discriminator.get("propertyName") if isinstance(discriminator, dict) else None
    if not isinstance(name, str) or not all(isinstance(one, dict) and list(one) == ["$ref"] for one in alternatives):
        return alternatives
    return [{**one, "required": [name]} for one in alternatives]
