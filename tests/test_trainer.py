"""The loop as a whole, on a small random model and reward: equivalences, resume, checkpoints."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from small_runs import config_of, gradient, train, weights, without_time
from torch import Tensor

from leapalign.config import ModelConfig
from leapalign.inputs.validation import UserError
from leapalign.methods import METHODS
from leapalign.methods.leapalign import LeapAlign
from leapalign.models import load_model
from leapalign.models.weights import read_weights
from leapalign.runs.checkpoint import AVERAGE, TRANSFORMER, latest_checkpoint
from leapalign.runs.run_folder import MetricsLog, read_metrics
from leapalign.tiny.model import (
    build_scheduler,
)
from leapalign.trainer import Trainer


def test_two_runs_are_bit_equal_and_move_the_weights(parts: Path, tmp_path: Path) -> None:
    first, second = (train(config_of(parts, tmp_path / name)) for name in "ab")
    assert torch.equal(weights(first), weights(second))
    assert without_time(read_metrics(tmp_path / "a")) == without_time(read_metrics(tmp_path / "b"))
    start = Trainer.from_config(config_of(parts, tmp_path / "c"))
    assert not torch.equal(weights(first), weights(start))
    other = train(config_of(parts, tmp_path / "d", "seed=1"))
    assert not torch.equal(weights(first), weights(other))


@pytest.mark.parametrize("small", [(), ("model.dtype=bfloat16", "optimizer.name=adamw_8bit", "ema.dtype=float32")])
def test_resume_is_bit_equal_to_not_stopping(parts: Path, tmp_path: Path, small: tuple[str, ...]) -> None:
    asked = ("optimizer.warmup_iterations=3", *small)
    whole = train(config_of(parts, tmp_path / "whole", *asked))
    stopped = Trainer.from_config(config_of(parts, tmp_path / "cut", *asked))
    run = tmp_path / "cut"
    run.mkdir()
    with MetricsLog(run, 0) as log:
        for record in stopped.run():
            log.write(record)
            if record["iteration"] == 3:  # one iteration past the checkpoint: lost, and done again
                break
    resumed = train(config_of(parts, run, *asked), resume=True)
    assert torch.equal(weights(whole), weights(resumed))
    for folder in (TRANSFORMER, AVERAGE):
        a, b = (read_weights(tmp_path / name / "checkpoints" / "step-4" / folder) for name in ("whole", "cut"))
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert without_time(read_metrics(run)) == without_time(read_metrics(tmp_path / "whole"))


@pytest.mark.parametrize(
    "assignments",
    [("train.microbatch=1",), ("train.microbatch=3",), ("train.reward_chunk=1",)],
)
def test_splitting_the_work_changes_only_rounding(parts: Path, tmp_path: Path, assignments: tuple[str, ...]) -> None:
    train(config_of(parts, tmp_path / "whole", "train.iterations=1"))
    train(config_of(parts, tmp_path / "split", "train.iterations=1", *assignments))
    records = [read_metrics(tmp_path / name)[0] for name in ("whole", "split")]
    for name in ("reward", "loss", "grad_norm", "d_j"):
        assert records[0][name] == pytest.approx(records[1][name], rel=1e-4)


def test_accumulated_gradient_is_the_mean_over_rollouts(parts: Path, tmp_path: Path) -> None:
    """Two rollouts of four, one of eight."""
    several, one = (
        gradient(config_of(parts, tmp_path, "train.batch_size=8", f"rollout.batch_size={size}")) for size in (4, 8)
    )
    torch.testing.assert_close(several, one, rtol=1e-4, atol=1e-6)


def test_run_folder_holds_what_it_promises(parts: Path, tmp_path: Path) -> None:
    trainer = train(config_of(parts, tmp_path / "run"))
    run = tmp_path / "run"
    assert [record["iteration"] for record in read_metrics(run)] == [1, 2, 3, 4]
    assert {"reward", "loss", "grad_norm", "d_j", "d_end", "w", "seconds"} <= read_metrics(run)[0].keys()
    assert sorted(path.name for path in (run / "samples").iterdir()) == ["step-0.png", "step-2.png", "step-4.png"]
    assert list((run / "tensorboard").glob("events.*"))
    checkpoint = latest_checkpoint(run)
    assert checkpoint == run / "checkpoints" / "step-4"
    # Diffusers layout: the real class loads it.
    loaded = type(trainer.model.transformer).from_pretrained(checkpoint / TRANSFORMER)
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.parameters(), trainer.model.transformer.parameters(), strict=True)
    )
    assert not list(run.rglob("*.partial"))


@pytest.mark.parametrize("warmup", [False, True])
def test_average_follows_its_formula(parts: Path, tmp_path: Path, warmup: bool) -> None:
    """``avg <- d avg + (1 - d) w`` with ``d = 0.995``, or at most ``(1 + i) / (10 + i)`` from the second step on."""
    asked = ("train.iterations=3", f"ema.warmup={str(warmup).lower()}")
    trainer = Trainer.from_config(config_of(parts, tmp_path / "run", *asked))
    average = weights(trainer)
    for record in trainer.run():
        step = int(record["iteration"]) - 1
        decay = 0.995 if not warmup else min(0.995, (1 + step) / (10 + step)) if step else 0.0
        average = decay * average + (1 - decay) * weights(trainer)
    with trainer.optimizer.averaged_weights():
        torch.testing.assert_close(weights(trainer), average, rtol=1e-5, atol=1e-6)
    assert not torch.equal(weights(trainer), average)


def test_checkpoint_of_another_optimizer_is_refused(parts: Path, tmp_path: Path) -> None:
    config = config_of(parts, tmp_path / "run", "train.iterations=1")
    train(config)
    with pytest.raises(UserError, match=r"^a run begun with optimizer\.name adamw cannot go on with adamw_8bit"):
        train(config_of(parts, tmp_path / "run", "optimizer.name=adamw_8bit"), resume=True)


def test_unfinished_checkpoint_is_not_taken(parts: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints" / "step-9.partial").mkdir(parents=True)
    assert latest_checkpoint(run) is None


def test_cut_metrics_line_is_dropped_on_resume(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1, "reward": 0.5}\n{"iteration": 2, "rew')
    with MetricsLog(tmp_path, 1) as log:
        log.write({"iteration": 2, "reward": 0.6})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [1, 2]


def test_model_protocol_is_met_by_flux(parts: Path) -> None:
    model = load_model(ModelConfig(path=str(parts / "model")))
    assert model.draw_noise([1, 2]).shape == (2, 16, 16)
    assert torch.equal(model.draw_noise([1, 2])[1], model.draw_noise([2])[0])
    assert build_scheduler().config.use_dynamic_shifting


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains(parts: Path, tmp_path: Path, name: str) -> None:
    asked = ("rollout.num_steps=6", "train.leaps_per_rollout=2", "train.iterations=2", f"method.name={name}")
    config = config_of(parts, tmp_path, *asked, "diagnostics.true_gradient_every=2", "train.microbatch=2")
    trainer = Trainer.from_config(config)
    before = weights(trainer)
    first, second = trainer.run()
    assert not torch.equal(weights(trainer), before)
    assert all(math.isfinite(value) for record in (first, second) for value in record.values())
    assert first["hinge_closed"] == 0
    assert 0 < first["true_gradient_cosine"] <= 1 + 1e-6
    assert "true_gradient_cosine" not in second, "asked for every other iteration"
    assert first["gradient_term_0"] > 0


def test_exact_backpropagation_agrees_with_itself(parts: Path, tmp_path: Path) -> None:
    """The whole loop for draft_k through all steps, accumulated over two rollouts, is the true gradient."""
    asked = ("train.batch_size=8", "method.name=draft_k", "method.steps=null", "diagnostics.true_gradient_every=1")
    (record,) = Trainer.from_config(config_of(parts, tmp_path, *asked, "train.iterations=1")).run()
    assert record["true_gradient_cosine"] == pytest.approx(1, abs=1e-5)
    assert record["true_gradient_norm_ratio"] == pytest.approx(1, abs=1e-5)


def test_comparing_with_the_true_gradient_changes_nothing(parts: Path, tmp_path: Path) -> None:
    plain = gradient(config_of(parts, tmp_path, "train.batch_size=8"))
    compared = gradient(config_of(parts, tmp_path, "train.batch_size=8", "diagnostics.true_gradient_every=1"))
    assert torch.equal(plain, compared)


def test_several_leaps_on_a_rollout_give_the_mean_of_their_gradients(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = [
        {"k": torch.tensor([0, 1, 0, 0]), "j": torch.tensor([1, 2, 2, 1])},
        {"k": torch.tensor([1, 0, 1, 0]), "j": torch.tensor([2, 1, 2, 2])},
    ]
    queue: list[dict[str, Tensor]] = []
    monkeypatch.setattr(LeapAlign, "draw", lambda *_: queue.pop(0))

    def of(*draws: dict[str, Tensor]) -> Tensor:
        # Making a trainer draws once, to check the options.
        queue.extend([drawn[0], *draws])
        return gradient(config_of(parts, tmp_path, f"train.leaps_per_rollout={len(draws)}"))

    one, other = of(drawn[0]), of(drawn[1])
    torch.testing.assert_close(of(*drawn), (one + other) / 2, rtol=1e-4, atol=1e-7)
    assert not torch.allclose(one, other, rtol=1e-2)


def test_closed_hinges_are_counted_and_carry_no_gradient(parts: Path, tmp_path: Path) -> None:
    (record,) = Trainer.from_config(config_of(parts, tmp_path, "threshold=-9", "train.iterations=1")).run()
    assert record["hinge_closed"] == 1
    assert record["grad_norm"] == 0


@pytest.mark.parametrize("batched", ["true", "false"])
def test_guided_models_train(parts: Path, tmp_path: Path, batched: str) -> None:
    asked = ("model.true_cfg_scale=3", "model.negative_prompt=a cross", f"model.true_cfg_batched={batched}")
    (guided,) = Trainer.from_config(config_of(parts, tmp_path, *asked, "train.iterations=1")).run()
    (plain,) = Trainer.from_config(config_of(parts, tmp_path, "train.iterations=1")).run()
    assert guided["grad_norm"] > 0
    assert guided["reward"] != plain["reward"]


def test_too_few_steps_for_the_method_is_said_before_anything_is_written(parts: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="2 leaps need at least 2 sampling steps"):
        Trainer.from_config(config_of(parts, tmp_path / "run", "rollout.num_steps=1"))
    with pytest.raises(UserError, match="index_range"):
        Trainer.from_config(config_of(parts, tmp_path / "run", "method={name: leapalign, index_range: [2, 9]}"))
    assert not (tmp_path / "run").exists()


def test_what_no_memory_holds_is_said_before_anything_is_written(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("rollout.num_steps=100", "rollout.batch_size=1024", "train.batch_size=1024")
    monkeypatch.setattr("os.sysconf", lambda name: {"SC_PAGE_SIZE": 2**12, "SC_PHYS_PAGES": 2**15}[name])
    with pytest.raises(UserError, match=r"1,024 images in 100 steps take 0\.2 GiB, and there are 0\.1 GiB"):
        Trainer.from_config(config_of(parts, tmp_path / "run", *asked))
    assert not (tmp_path / "run").exists()


def test_prompts_are_encoded_after_all_checks(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leapalign.trainer.embeddings_of", lambda *_: pytest.fail("long work"))
    for asked in ("model.dtype=bfloat16", "memory.attention=flash", "rollout.num_steps=1", "model.height=30"):
        with pytest.raises(UserError):
            Trainer.from_config(config_of(parts, tmp_path / "run", asked))


@pytest.mark.parametrize(("threshold", "count"), [("1.0", 0), ("1.5", 1), ("-2", 1)])
def test_a_run_warns_once_of_an_unsuitable_threshold(
    parts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, threshold: str, count: int
) -> None:
    trainer = train(config_of(parts, tmp_path, f"threshold={threshold}"))
    assert trainer.iteration == 4
    assert len([message for message in caplog.messages if message.startswith("threshold")]) == count


def test_a_resumed_run_may_have_reached_its_threshold(
    parts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(config_of(parts, tmp_path, "train.iterations=2"))
    train(config_of(parts, tmp_path, "threshold=-2"), resume=True)
    assert not [message for message in caplog.messages if message.startswith("threshold")]
