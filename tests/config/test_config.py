from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from leapalign.config import Config, load_config, override, save_config
from leapalign.inputs.validation import UserError, validated

ROOT = Path(__file__).parents[2]


def config_of(*assignments: str) -> Config:
    return validated(Config, override({}, assignments), "config")


def test_overrides_reach_nested_keys_and_keep_the_rest() -> None:
    config = config_of(
        "train.iterations=7", "optimizer.learning_rate=1e-4", "method.alpha=0.1", "method.name=leapalign"
    )
    assert config.train.iterations == 7
    assert config.optimizer.learning_rate == 1e-4
    assert config.method == {"alpha": 0.1, "name": "leapalign"}
    assert config.train.batch_size == Config().train.batch_size


def test_saved_config_loads_to_the_same(tmp_path: Path) -> None:
    config = config_of("seed=5", "train.microbatch=2")
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


def test_every_shipped_config_is_valid() -> None:
    files = sorted((ROOT / "configs").glob("*.yaml"))
    assert files
    for file in files:
        load_config(file)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("trian.iterations=3", r"unknown key 'trian'; did you mean 'train'\?"),
        ("train.iteration=3", r"unknown key 'train.iteration'; did you mean 'iterations'\?"),
        ("train.iterations=0", "'train.iterations' is 0: .*greater than or equal to 1"),
        ("train.iterations=many", "'train.iterations' is 'many'"),
        ("optimizer.learning_rate=-1", "'optimizer.learning_rate' is -1"),
        ("optimizer.learning_rate=.inf", "'optimizer.learning_rate'"),
        ("train=3", "'train' is 3"),
        ("train.batch_size=33", "multiple of rollout.batch_size"),
        ("output=", "'output' is empty, .*; give it a value, or leave it out"),
        ("output=~", "'output' is empty"),
        ("model.lora_targets=to_q", r"'model\.lora_targets' is 'to_q', and a list is needed; write \[to_q\]"),
        ("method={}", "'method.name' is missing"),
        ("train", "must read section.key=value"),
        ("=3", "must read section.key=value"),
        ("seed=[1", "not valid YAML"),
        ("seed.deep=1", "unknown key 'seed'|'seed' is"),
    ],
)
def test_wrong_values_are_one_sentence_with_the_remedy(assignment: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        config_of(assignment)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("recomputed", ["checkpointing=none", "checkpointing=attention", "checkpoint_every=2"])
def test_streamed_weights_need_every_block_recomputed(recomputed: str) -> None:
    streamed = ("memory.weights=streamed", "memory.optimizer=host", "optimizer.name=adamw_8bit")
    config_of(*streamed, "memory.checkpointing=blocks")
    with pytest.raises(UserError, match=r"as a whole; set memory\.checkpointing to blocks"):
        config_of(*streamed, "memory.checkpointing=blocks", f"memory.{recomputed}")


def test_override_into_a_value_is_refused() -> None:
    with pytest.raises(UserError, match="'seed' is a value, not a section"):
        override({"seed": 3}, ["seed.deep=1"])


@pytest.mark.parametrize(
    ("text", "message"), [("- 1\n- 2\n", "must be a mapping"), ("a: [1\n", "not valid YAML"), ("", "must be a mapping")]
)
def test_files_that_are_no_config_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_config(path)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read config"):
        load_config(tmp_path / "none.yaml")


def test_tags_that_build_objects_are_not_obeyed(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("output: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(UserError, match="not valid YAML"):
        load_config(path)


def test_documented_defaults_are_the_papers() -> None:
    config = Config()
    assert (config.rollout.num_steps, config.optimizer.learning_rate, config.ema.decay) == (25, 1e-5, 0.995)
    assert yaml.safe_load((ROOT / "configs" / "tiny.yaml").read_text())["output"] == "runs/tiny"


def test_messages_are_one_line_that_no_terminal_obeys() -> None:
    assert str(UserError("the key 'a\nb\x1b[31m\u202e'\r\n is odd")) == "the key 'a b\ufffd[31m\ufffd' is odd"
