"""What a resumed run may change takes effect, what it may not is refused by name, and a history keeps both."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from command_line import refused
from small_runs import config_of, train
from watched_runs import watched

from leapalign.cli import main
from leapalign.config import load_config, save_config
from leapalign.config.resuming import MAY_CHANGE, PROMPTS_DIGEST, RESUMED, UNLESS_WATCHED, settings_of
from leapalign.runs.checkpoint import step_folder
from leapalign.runs.history import FILE, note_settings, trained_with
from leapalign.runs.run_folder import read_metrics
from leapalign.storage.folder_lock import LOCK, OWNER

DONE = 2
BASE = (
    "optimizer.name=adamw_8bit",
    "optimizer.schedule=linear",
    "train.iterations=2",
    "train.batch_size=2",
    "rollout.batch_size=2",
    "samples.every=0",
    "reward=[{name: pickscore, path: REWARD}, {name: clipscore, path: REWARD, weight: 0.5}]",
)
# One at a time, as each has to change what is trained.
EFFECTIVE = {
    "threshold": ("threshold=-9",),
    "model.true_cfg_scale": ("model.true_cfg_scale=2",),
    "model.max_sequence_length": ("model.max_sequence_length=4",),
    "rollout.num_steps": ("rollout.num_steps=4",),
    "rollout.cache": ("rollout.cache={name: first_block, threshold: 1e9}",),
    "method": ("method={name: draft_k}",),
    "reward": ("reward={name: clipscore, path: REWARD}",),
    "equal_reward_gradients": ("equal_reward_gradients=true",),
    "optimizer.learning_rate": ("optimizer.learning_rate=1e-4",),
    "optimizer.beta1": ("optimizer.beta1=0.5",),
    "optimizer.beta2": ("optimizer.beta2=0.9",),
    "optimizer.weight_decay": ("optimizer.weight_decay=0.5",),
    "optimizer.max_grad_norm": ("optimizer.max_grad_norm=1e-4",),
    "optimizer.schedule": ("optimizer.schedule=cosine",),
    "optimizer.warmup_iterations": ("optimizer.warmup_iterations=5",),
    "ema.decay": ("ema.decay=0.01",),
    "ema.warmup": ("ema.warmup=true",),
    "ema.start": ("ema.start=9",),
    "ema.interval": ("ema.interval=2",),
    "train.image_clamp": ("train.image_clamp=plain",),
    "train.leaps_per_rollout": ("train.leaps_per_rollout=2",),
    "regularization.base_velocity": ("regularization.base_velocity=100",),
}
# Together, as they change when, where and what is shown; `compile` takes minutes, and is only decided.
SHOWN = {
    "model.true_cfg_batched": "false",
    "prompts.path": "PROMPTS",
    "prompts.cache": "CACHE",
    "rollout.batch_size": "1",
    "train.microbatch": "1",
    "train.reward_chunk": "1",
    "memory.optimizer": "host",
    "memory.weights": "streamed",
    "memory.shard": "gradients",
    "memory.stream_buffers": "2",
    "memory.checkpointing": "blocks",
    "memory.checkpoint_decoder": "true",
    "memory.rewards": "host",
    "memory.attention": "native",
    "checkpoint.every": "1",
    "checkpoint.keep": "1",
    "samples.every": "3",
    "samples.count": "1",
    "evaluate.rewards": "[{name: clipscore, path: REWARD}]",
    "evaluate.num_steps": "2",
    "evaluate.guidance": "1.5",
}
ELSEWHERE = {
    "model.compile": "compiling takes minutes",
    "model.guidance": "the tiny model takes none",
    "model.negative_prompt": "together with model.true_cfg_scale",
    "model.cfg_gradient": "together with model.true_cfg_scale",
    "model.cfg_gradient_compensated": "together with model.true_cfg_scale",
    "rollout.sigmas": "the tiny model's are linear",
    "memory.checkpoint_every": "streamed weights need 1",
    "diagnostics.true_gradient_every": "needs gradients on the device",
    "train.iterations": "every resumed run here has more",
    **{key: "tests/watch" for key in RESUMED if key.startswith("watch.")},
}
FORBIDDEN = {
    "output": "output=elsewhere",
    "seed": "seed=1",
    "model.path": "model.path=embedded:base",
    "model.dtype": "model.dtype=bfloat16",
    "model.lora_rank": "model.lora_rank=2",
    "model.lora_path": "model.lora_path=ADAPTER",
    "model.height": "model.height=32",
    "model.width": "model.width=32",
    "optimizer.name": "optimizer.name=adafactor",
    "ema.dtype": "ema.dtype=bfloat16",
    "train.batch_size": "train.batch_size=4",
    "kernels.patch": "kernels.patch=true",
    PROMPTS_DIGEST: "prompts.path=OTHER",
}
FORBIDDEN_ELSEWHERE = {
    **dict.fromkeys(("model.lora_alpha", "model.lora_targets"), "tests/models/test_lora_start.py"),
    "model.quantization": "tests/models/test_quantization.py",
}


@pytest.fixture(scope="module")
def done(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("done") / "run"
    train(config_of(parts, run, *[item.replace("REWARD", str(parts / "reward")) for item in BASE]))
    return run


@pytest.fixture
def run(done: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(done, tmp_path / "run"))


def resumed(run: Path, parts: Path, *assignments: str) -> bytes:
    """Trains an iteration more; the manifest of what comes of it."""
    given = [item.replace("REWARD", str(parts / "reward")) for item in assignments]
    assert main(["train", "--resume", str(run), f"train.iterations={DONE + 1}", *given]) == 0
    assert len(read_metrics(run)) == DONE + 1
    return (step_folder(run, DONE + 1) / "manifest.json").read_bytes()


def history(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / FILE).read_text().splitlines()]


def tree(run: Path) -> dict[str, bytes]:
    return {
        str(path): path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name not in (LOCK, OWNER)
    }


def test_every_key_is_tried() -> None:
    tried = {*EFFECTIVE, *SHOWN, *ELSEWHERE}
    assert tried == {key for key, reason in RESUMED.items() if reason in (MAY_CHANGE, UNLESS_WATCHED)}
    assert set(FORBIDDEN) | set(FORBIDDEN_ELSEWHERE) == set(RESUMED) - tried


@pytest.fixture(scope="module")
def unchanged(done: Path, parts: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return resumed(Path(shutil.copytree(done, tmp_path_factory.mktemp("unchanged") / "run")), parts)


@pytest.mark.parametrize("key", EFFECTIVE)
def test_what_may_change_takes_effect(run: Path, parts: Path, unchanged: bytes, key: str) -> None:
    assert resumed(run, parts, *EFFECTIVE[key]) != unchanged
    assert set(history(run)[-1]["settings"]) == {"train.iterations", key}
    assert history(run)[-1]["iteration"] == DONE


@pytest.mark.native
def test_where_things_live_and_what_is_shown_may_change(
    run: Path, parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copy(parts / "prompts.txt", tmp_path / "moved.txt"))
    config = str(run / "config.yaml")
    assert main(["cache", "--config", config, "--output", str(tmp_path / "cache")]) == 0
    words = {"PROMPTS": str(copy), "CACHE": str(tmp_path / "cache"), "REWARD": str(parts / "reward")}
    given = []
    for key, value in SHOWN.items():
        for word, path in words.items():
            value = value.replace(word, path)
        given.append(f"{key}={value}")
    resumed(run, parts, *given)
    changed = settings_of(load_config(run / "config.yaml"))
    before = history(run)[0]["settings"]
    assert all(changed[key] != before[key] for key in SHOWN)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-3"]
    assert [path.name for path in (run / "samples").iterdir()] == ["step-3.png"]


def test_the_rest_trains(run: Path, parts: Path, unchanged: bytes) -> None:
    asked = ("memory.checkpointing=blocks", "memory.checkpoint_every=2", "diagnostics.true_gradient_every=1")
    guided = ("model.true_cfg_scale=2", "model.negative_prompt=a cross", "model.guidance=1")
    gradient = ("model.cfg_gradient=detached", "model.cfg_gradient_compensated=true")
    assert resumed(run, parts, *asked, *guided, *gradient) != unchanged
    assert "true_gradient_cosine" in read_metrics(run)[-1]


@pytest.mark.parametrize("key", FORBIDDEN)
def test_what_may_not_change_is_refused_by_name_and_nothing_is_written(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    other = tmp_path / "other.txt"
    other.write_text("a circle\nsomething else")
    before = tree(run)
    change = FORBIDDEN[key].replace("OTHER", str(other))
    error = refused(["train", "--resume", str(run), "train.iterations=3", change], capsys)
    assert f"cannot change {'the prompts in prompts.path' if key == PROMPTS_DIGEST else key}" in error
    assert f"{RESUMED[key]}; set it back, or begin a new run with another output" in error
    assert tree(run) == before


def test_a_config_file_or_a_hand_in_config_yaml_is_held_to_the_same(
    run: Path, parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.yaml"
    for file in (path, run / "config.yaml"):
        save_config(load_config(run / "config.yaml", ["train.batch_size=4", "output=elsewhere"]), file)
        error = refused(["train", "--resume", str(run), *(["--config", str(file)] if file == path else [])], capsys)
        assert "cannot change train.batch_size from 2 to 4" in error
    save_config(load_config(run / "config.yaml", ["train.batch_size=2", "train.iterations=3"]), path)
    assert main(["train", "--resume", str(run), "--config", str(path)]) == 0
    assert history(run)[-1] == {"iteration": DONE, "settings": {"train.iterations": 3}}
    assert load_config(run / "config.yaml").output == str(run)


def test_before_the_first_checkpoint_all_may_change(run: Path, parts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(run / "checkpoints")
    assert main(["train", "--resume", str(run), "seed=1", "model.height=16", "train.iterations=1"]) == 0
    (only,) = history(run)
    assert (only["iteration"], only["settings"]["seed"], only["settings"]["model.height"]) == (0, 1, 16)
    assert [record["iteration"] for record in read_metrics(run)] == [1]


def test_fewer_iterations_than_are_done_are_refused_and_a_finished_run_says_so(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "has done 2 iterations" in refused(["train", "--resume", str(run), "train.iterations=1"], capsys)
    assert main(["train", "--resume", str(run)]) == 0
    assert "all 2 iterations are done; raise train.iterations to go on" in capsys.readouterr().err


def test_the_history_tells_what_made_each_iteration(tmp_path: Path) -> None:
    """Also after a kill between any two writes: an entry that never came into force is replaced by the next."""
    first = {"seed": 0, "threshold": 1.0}
    note_settings(tmp_path, 0, first)
    note_settings(tmp_path, 4, {**first, "threshold": 2.0})
    note_settings(tmp_path, 4, {**first, "threshold": 3.0})
    assert history(tmp_path) == [
        {"iteration": 0, "settings": first},
        {"iteration": 4, "settings": {"threshold": 3.0}},
    ]
    assert [trained_with(tmp_path, n).get("threshold") for n in (0, 4, 5)] == [None, 1.0, 3.0]
    note_settings(tmp_path, 8, {**first, "threshold": 3.0})
    assert len(history(tmp_path)) == 2, "nothing has changed"
    note_settings(tmp_path, 2, first)
    assert history(tmp_path) == [{"iteration": 0, "settings": first}], "what came after is gone"


def test_a_run_without_a_history_is_held_to_its_config(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / FILE).unlink()
    assert "cannot change seed from 0 to 1" in refused(["train", "--resume", str(run), "seed=1"], capsys)
    assert main(["train", "--resume", str(run), "train.iterations=3", "threshold=2"]) == 0
    assert history(run)[0]["settings"]["threshold"] == 2


@pytest.mark.parametrize("change", ["reward={name: clipscore, path: REWARD}", "rollout.num_steps=4"])
def test_a_watched_run_cannot_change_what_its_base_is_compared_with(
    parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    run = tmp_path / "run"
    train(watched(parts, run, "train.iterations=2", "samples.every=0"))
    capsys.readouterr()
    before, change = tree(run), change.replace("REWARD", str(parts / "reward"))
    further = ["train", "--resume", str(run), "train.iterations=3", change]
    assert f"{change.partition('=')[0]} has changed since the base was measured" in refused(further, capsys)
    assert tree(run) == before
    assert main([*further, "watch.every=0"]) == 0
