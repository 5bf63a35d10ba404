"""Every key of a config file, with type, default and sentence: as a JSON Schema, and as a list read from one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ConfigDict, TypeAdapter
from pydantic.json_schema import GenerateJsonSchema

from leapalign.config.sections import Config

Schema = dict[str, Any]
_OPEN = {"additionalProperties": True, "type": "object"}
"""How pydantic writes a mapping to anything, which in a config is a method or a reward with its options."""


class _Untitled(GenerateJsonSchema):
    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def config_schema(methods: Mapping[str, type[Any]], rewards: Mapping[str, type[Any]], share: type[Any]) -> Schema:
    """The JSON Schema of a config file.

    methods, rewards: the dataclass of each one's options, by name. share: that of the options which all rewards have.
    Sentences are the docstrings under the fields.
    """
    common = _definitions([share])[share.__name__]["properties"]
    definitions = _definitions([Config, *methods.values(), *rewards.values()])
    config = definitions.pop("Config")
    config["properties"]["method"] = _closed(config["properties"]["method"], "Method")
    config, definitions = _closed(config, "Reward"), _closed(definitions, "Reward")
    for key in ("method", "reward"):
        config["properties"][key]["default"] = dataclasses.asdict(Config())[key]
    for kind, classes, options in (("Method", methods, {}), ("Reward", rewards, common)):
        for name, cls in classes.items():
            definition = definitions[cls.__name__]
            definition["properties"] = {"name": {"const": name}, **definition["properties"], **options}
            definition["required"] = ["name", *definition.get("required", [])]
        definitions[kind] = {"oneOf": [_reference(cls.__name__) for cls in classes.values()]}
    described = {"$schema": "https://json-schema.org/draft/2020-12/schema", **config, "$defs": definitions}
    return {**described, "title": "A config of leapalign"}


def _definitions(classes: Iterable[type[Any]]) -> dict[str, Schema]:
    """The schemas of dataclasses and of the sections in them, by class name."""
    found: dict[str, Schema] = {}
    for cls in classes:
        # Pydantic takes settings for a list, which it would not for a dataclass of the standard library.
        adapter = TypeAdapter(list[cls], config=ConfigDict(use_attribute_docstrings=True, extra="forbid"))  # type: ignore[valid-type]
        found |= adapter.json_schema(schema_generator=_Untitled)["$defs"]
        # It reads the docstrings under a class's own fields, not under those that it inherits.
        for base in filter(dataclasses.is_dataclass, cls.__mro__[1:]):
            for name, option in _definitions([base])[base.__name__]["properties"].items():
                found[cls.__name__]["properties"][name] = option | found[cls.__name__]["properties"][name]
    return found


def _closed(schema: Any, kind: str) -> Any:
    """``schema`` with a method or reward in the place of each mapping to anything, and sentences in one line."""
    if isinstance(schema, list):
        return [_closed(item, kind) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: _closed(value, kind) for key, value in schema.items()}
    if "description" in result:
        result["description"] = " ".join(result["description"].split())
    if result.items() >= _OPEN.items():
        result = {**{key: value for key, value in result.items() if key not in _OPEN}, **_reference(kind)}
    return result


def _reference(name: str) -> Schema:
    return {"$ref": f"#/$defs/{name}"}


@dataclass(frozen=True)
class Key:
    """One key: its dotted name, what may stand there in words, its default as YAML (None: it must be given)."""

    name: str
    kind: str
    default: str | None
    sentence: str


def keys(schema: Schema) -> Iterator[Key]:
    """Every key, the options of each method and reward included."""
    for _, of_group in groups(schema):
        yield from of_group


def groups(schema: Schema) -> Iterator[tuple[str, list[Key]]]:
    """Headings and keys: those of every config, then the options of each method and of each reward."""
    definitions = schema["$defs"]
    yield "Every config", list(_keys(schema, "", definitions))
    for kind in ("method", "reward"):
        for reference in definitions[kind.capitalize()]["oneOf"]:
            options = _referred(reference, definitions)
            name = options["properties"]["name"]["const"]
            yield f"{kind.capitalize()} {name}: {options['description']}", list(_keys(options, f"{kind}.", definitions))


def _keys(section: Schema, prefix: str, definitions: Schema) -> Iterator[Key]:
    for name, value in section["properties"].items():
        below = _referred(value, definitions)
        if "properties" in below:
            yield from _keys(below, f"{prefix}{name}.", definitions)
        else:
            default = _written(value["default"]) if "default" in value else None
            yield Key(prefix + name, _in_words(value), default, value.get("description", ""))


def _referred(schema: Schema, definitions: Schema) -> Schema:
    found: Schema = definitions[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
    return found


def _written(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value)


def _in_words(schema: Schema) -> str:
    if "$ref" in schema:
        return f"a {schema['$ref'].rpartition('/')[2].lower()}"
    if "anyOf" in schema:
        return " or ".join(_in_words(option) for option in schema["anyOf"])
    if "const" in schema:
        return str(schema["const"])
    if "enum" in schema:
        return " | ".join(map(str, schema["enum"]))
    if "prefixItems" in schema:
        return f"list of {len(schema['prefixItems'])}: {_in_words(schema['prefixItems'][0])}"
    if schema["type"] == "array":
        return f"list: {_in_words(schema['items'])}"
    bounds = [f"{word} {schema[bound]:g}" for bound, word in _BOUNDS.items() if abs(schema.get(bound, 1e9)) < 1e9]
    kind: str = schema["type"]
    return " ".join([_TYPES.get(kind, kind), *bounds])


_TYPES = {"string": "text", "boolean": "true | false"}
_BOUNDS = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}
