"""What the watch on reward hacking records, and that watching changes nothing of the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import refused
from places import BYTES, STREAMED
from small_runs import config_of, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from watched_runs import HELD_OUT, METRICS, other_reward, train_command, watched

from leapalign.cli import main
from leapalign.evaluation.generate import generate
from leapalign.memory import placement
from leapalign.models import encode_prompts, load_model
from leapalign.rewards import get_reward
from leapalign.runs.checkpoint import step_folder
from leapalign.runs.run import Run
from leapalign.watch import image_statistics as statistics
from leapalign.watch.metrics import metric_names
from leapalign.watch.records import FILE, read_watch
from leapalign.watch.watch import SEED


def test_the_records_are_those_of_the_average_on_held_out_prompts(parts: Path, tmp_path: Path) -> None:
    """Scored and measured anew from the checkpoint, one way at a time."""
    one = f"name: pickscore, path: {parts / 'reward'}"
    both = f"reward=[{{{one}, scale: cosine}}, {{{one}, scale: logit, weight: 0.5}}]"
    config = watched(parts, tmp_path / "run", both, other_reward(parts), "watch.seeds=3")
    train(config)
    records = read_watch(tmp_path / "run")
    assert [record["iteration"] for record in records] == [0, 2, 4]
    assert all(list(record) == ["iteration", *metric_names(config)] for record in records)

    prompts = [prompt for prompt in HELD_OUT for _ in range(3)]
    embeddings = encode_prompts(config.model, prompts)
    path = str(parts / "reward")
    cosine, logit = (get_reward("pickscore", path=path, scale=scale) for scale in ("cosine", "logit"))
    for record, step in zip(records, (None, 2, 4), strict=True):
        model = load_model(config.model)
        if step:
            folder = step_folder(tmp_path / "run", step) / "transformer_ema"
            model.transformer = type(model.transformer).from_pretrained(folder).eval()
        with torch.no_grad():
            images = generate(model, embeddings, range(SEED, SEED + 9), config.rollout.num_steps)
            scores = [reward(images, prompts).mean() for reward in (cosine, logit)]
            other = get_reward("clipscore", path=path)(images, prompts).mean()
        smalls = statistics.small(images).unflatten(0, (3, 3))
        expected = {
            "held_out_reward": scores[0] + 0.5 * scores[1],
            "held_out_reward_pickscore": scores[0],
            "held_out_reward_pickscore_2": scores[1],
            "held_out_clipscore": other,
            "saturation": statistics.saturation(images).mean(),
            "sharpness": statistics.sharpness(images).mean(),
            "edge_density": statistics.edge_density(images).mean(),
            "diversity": statistics.diversity(smalls).mean(),
        }
        assert {name: record[name] for name in expected} == pytest.approx(
            {name: float(value) for name, value in expected.items()}, rel=1e-3, abs=1e-5
        )
    assert records[0]["drift"] == 0
    assert 0 < records[1]["drift"] < records[2]["drift"]


def test_batches_change_only_rounding(parts: Path, tmp_path: Path) -> None:
    found = []
    for size in (1, 4):
        config = watched(parts, tmp_path / str(size), f"rollout.batch_size={size}", "train.iterations=2")
        train(config)
        found.append(read_watch(tmp_path / str(size)))
    for one, other in zip(*found, strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-6)


def test_streamed_weights_are_watched_alike_and_watching_changes_nothing(parts: Path, tmp_path: Path) -> None:
    runs = {
        "resident": watched(parts, tmp_path / "resident", BYTES),
        "streamed": watched(parts, tmp_path / "streamed", BYTES, *STREAMED),
        "not watched": config_of(parts, tmp_path / "not watched", BYTES),
    }
    for config in runs.values():
        train(config)
    first, second = (read_watch(tmp_path / name) for name in ("resident", "streamed"))
    assert first == second
    manifests = [(step_folder(tmp_path / name, 4) / "manifest.json").read_bytes() for name in runs]
    assert manifests[0] == manifests[2]
    assert not (tmp_path / "not watched" / FILE).exists()


def test_cached_embeddings_serve_the_watch(parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cached = (f"prompts.cache={tmp_path / 'cache'}", "train.iterations=2")
    arguments = train_command(parts, tmp_path / "run", *cached)
    assert main(["cache", *arguments[1:]]) == 0
    capsys.readouterr()
    assert "lacks 3 of 3 prompts" in refused(arguments, capsys)
    assert main(["cache", *arguments[1:], "--prompts", str(parts / "held_out.txt")]) == 0
    assert main(arguments) == 0
    train(watched(parts, tmp_path / "encoded", "train.iterations=2"))
    assert read_watch(tmp_path / "run") == read_watch(tmp_path / "encoded")


def test_measurements_are_shown_and_go_to_tensorboard(
    parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*train_command(parts, tmp_path / "run", "train.iterations=2"), "--json"]) == 0
    printed = capsys.readouterr()
    record = read_watch(tmp_path / "run")[1]
    base = read_watch(tmp_path / "run")[0]
    lines = [line for line in printed.err.splitlines() if "watch, iteration 2" in line]
    assert len(lines) == 1
    for name in METRICS:
        assert f"{name} {record[name]:.3g} ({base[name]:.3g})" in lines[0]
    assert json.loads(printed.out.splitlines()[-1])["stopped_by"] is None
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("watch/diversity")] == [0, 2]


def test_rewards_of_the_watch_are_on_the_device_only_while_it_measures(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run.from_config(watched(parts, tmp_path, other_reward(parts)))
    moves: list[tuple[Any, torch.device]] = []
    monkeypatch.setattr(placement, "place_reward", lambda reward, device: moves.append((reward, device)))
    assert run.watch is not None
    (reward,) = run.watch.rewards.values()
    assert "held_out_clipscore" in run.watch.look(0, run.trainer.model, run.trainer.rewards)
    meta, host = torch.device("meta"), torch.device("cpu")
    with pytest.raises(ZeroDivisionError), placement.lent_device([reward], meta):
        raise ZeroDivisionError
    assert moves == [(reward, run.trainer.model.device), (reward, host), (reward, meta), (reward, host)]
