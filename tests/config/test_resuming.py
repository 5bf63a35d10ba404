"""What may change when a run is resumed: every key is decided, and said by name."""

from __future__ import annotations

import dataclasses

import pytest

from leapalign.config import Config
from leapalign.config.resuming import MAY_CHANGE, PROMPTS_DIGEST, RESUMED, UNLESS_WATCHED, refuse_changes, settings_of
from leapalign.inputs.validation import UserError

FORBIDDEN = {key: reason for key, reason in RESUMED.items() if reason not in (MAY_CHANGE, UNLESS_WATCHED)}


def test_every_key_is_decided() -> None:
    assert set(RESUMED) == set(settings_of(Config())) | {PROMPTS_DIGEST}


def test_settings_are_the_values_by_dotted_key_as_json_has_them() -> None:
    settings = settings_of(Config())
    assert settings["optimizer.learning_rate"] == 1e-5
    assert settings["method"] == {"name": "leapalign"}
    assert settings["model.lora_targets"] == []
    sections = [
        field.name for field in dataclasses.fields(Config) if dataclasses.is_dataclass(getattr(Config(), field.name))
    ]
    assert not set(sections) & set(settings)


@pytest.mark.parametrize("key", FORBIDDEN)
def test_what_may_not_change_is_named_with_the_reason(key: str) -> None:
    named = "the prompts in prompts.path" if key == PROMPTS_DIGEST else f"{key} from 1 to 2"
    with pytest.raises(UserError, match=f"cannot change {named}.*: {FORBIDDEN[key]}; set it back, or begin a new run"):
        refuse_changes({key: 1}, {key: 2})
    refuse_changes({key: 1}, {key: 1})
    refuse_changes({}, {key: 2})


def test_all_else_may_change() -> None:
    allowed = [key for key in RESUMED if key not in FORBIDDEN]
    refuse_changes(dict.fromkeys(allowed, 1), dict.fromkeys(allowed, 2))
