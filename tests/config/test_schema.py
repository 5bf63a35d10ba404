"""The schema of a config: shipped as it is generated, with every key and its sentence."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import yaml

from leapalign.config import Config
from leapalign.config.profiles import SCHEMA, profiles
from leapalign.config.schema import config_schema, groups, keys
from leapalign.methods import METHODS
from leapalign.rewards import REWARDS, Share


def generated() -> dict[str, Any]:
    return config_schema(METHODS, REWARDS, Share)


def names(cls: type[Any], prefix: str = "") -> Iterator[str]:
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.default_factory):
            yield from names(field.default_factory, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


def test_the_shipped_schema_is_what_the_code_says() -> None:
    """Else: leapalign config --json > schema.json, and put it into leapalign/config."""
    assert json.loads(SCHEMA.read_text()) == generated()


def test_every_key_is_there_with_its_sentence() -> None:
    every, *options = groups(generated())
    assert [key.name for key in every[1]] == list(names(Config))
    expected = [
        *([f"method.{name}" for name in ("name", *names(method))] for method in METHODS.values()),
        *([f"reward.{name}" for name in ("name", *names(reward), *names(Share))] for reward in REWARDS.values()),
    ]
    assert [[key.name for key in of] for _, of in options] == expected
    assert all(heading.count(": ") and not heading.endswith(": ") for heading, _ in options)
    silent = {key.name for key in keys(generated()) if not key.sentence}
    assert silent == {"method.name", "reward.name"}


def test_keys_say_type_and_default() -> None:
    found = {key.name: key for key in groups_of_every_config()}
    assert found["train.batch_size"].kind == "integer from 1 to 65536"
    assert found["train.batch_size"].default == "32"
    assert found["optimizer.name"].kind == "adamw | adamw_8bit | adafactor | bnb_adamw_8bit | bnb_paged_adamw_8bit"
    assert (found["prompts.cache"].kind, found["prompts.cache"].default) == ("text or null", "null")
    assert found["method"].default == '{"name": "leapalign"}'
    assert {key.name for key in keys(generated()) if key.default is None} == {
        "method.name",
        "reward.name",
        "reward.path",
        "reward.function",
    }


def groups_of_every_config() -> list[Any]:
    return next(iter(groups(generated())))[1]


def test_an_editor_would_take_every_shipped_config_and_no_unknown_key() -> None:
    schema = generated()
    for file in profiles().values():
        config = yaml.safe_load(file.read_text())
        assert not list(faults(config, schema, schema)), file
    for wrong in (
        {"trian": {}},
        {"train": {"iteration": 3}},
        {"method": {"name": "leapalign", "alhpa": 1}},
        {"method": {"name": "draft_k", "alpha": 1}},
        {"reward": [{"name": "aesthetic"}]},
    ):
        assert list(faults(wrong, schema, schema)), wrong


def faults(value: Any, schema: dict[str, Any], top: dict[str, Any]) -> Iterator[str]:
    """What is wrong with ``value`` by the parts of JSON Schema that ours uses, but for bounds."""
    if "$ref" in schema:
        schema = top["$defs"][schema["$ref"].rpartition("/")[2]]
    if options := schema.get("oneOf", schema.get("anyOf")):
        fitting = [option for option in options if not list(faults(value, option, top))]
        if not fitting or ("oneOf" in schema and len(fitting) > 1):
            yield f"{value} fits {len(fitting)}"
    if "const" in schema and value != schema["const"]:
        yield f"{value} is not {schema['const']}"
    if isinstance(value, dict):
        if schema.get("type", "object") != "object":
            yield f"{value} is no {schema['type']}"
        properties = schema.get("properties")
        for key, below in value.items() if properties is not None else ():
            if key in properties:
                yield from faults(below, properties[key], top)
            else:
                yield key
        yield from set(schema.get("required", ())) - set(value)
    if isinstance(value, list) and "items" in schema:
        for item in value:
            yield from faults(item, schema["items"], top)
