"""``evaluate.num_steps`` and ``evaluate.guidance``: which commands follow them, and what they mean for each family."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import last_json
from small_runs import config_of, train
from tiny_folders import save_stable_diffusion_3
from torch import Tensor

from leapalign.cli import main
from leapalign.config import save_config
from leapalign.evaluation import generate as generating
from leapalign.evaluation.generate import generate
from leapalign.evaluation.sampling import as_evaluated, in_words, sampled_with
from leapalign.models import encode_prompts, load_model
from leapalign.prompts.embeddings import embeddings_of

ASKED = ("evaluate.num_steps=5", "evaluate.guidance=7.5")


def test_null_leaves_the_settings_of_training(parts: Path) -> None:
    config = config_of(parts, parts / "none", "rollout.num_steps=4", "model.true_cfg_scale=2")
    assert as_evaluated(config) == config
    assert sampled_with(config) == {"num_steps": 4, "guidance": 2.0}


def test_guidance_is_what_the_model_takes(parts: Path, tmp_path: Path) -> None:
    """An input of a distilled FLUX; the scale of classifier-free guidance of others, whose other key stays."""
    distilled = tmp_path / "distilled"
    shutil.copytree(parts / "model", distilled)
    file = distilled / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "guidance_embeds": True}))
    flux = config_of(parts, tmp_path, *ASKED, f"model.path={distilled}", "model.true_cfg_scale=2")
    assert in_words(flux) == "5 steps, guidance 7.5"
    assert (as_evaluated(flux).model.guidance, as_evaluated(flux).model.true_cfg_scale) == (7.5, 2.0)
    save_stable_diffusion_3(tmp_path / "sd3")
    sd3 = config_of(parts, tmp_path, *ASKED, f"model.path={tmp_path / 'sd3'}")
    assert (as_evaluated(sd3).model.guidance, as_evaluated(sd3).model.true_cfg_scale) == (3.5, 7.5)
    assert in_words(sd3) == "5 steps, true_cfg_scale 7.5"
    assert as_evaluated(as_evaluated(sd3)) == as_evaluated(sd3)


def test_evaluate_and_generate_follow_and_say_so(
    parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The images are those of a model and a number of steps set by hand; training's samples stay the rollout's."""
    steps: list[int] = []
    original = generating.batches

    def noted(model: Any, embeddings: Any, seeds: Any, sigmas: Tensor, *rest: Any) -> Any:
        steps.append(len(sigmas) - 1)
        return original(model, embeddings, seeds, sigmas, *rest)

    monkeypatch.setattr(generating, "batches", noted)
    config = config_of(parts, tmp_path / "run", *ASKED, "train.iterations=1", "ema.decay=0.0")
    train(config)
    assert set(steps) == {3}, "sample grids keep the rollout's steps"
    steps.clear()
    assert main(["evaluate", "--run", config.output, "--json", "--page", str(tmp_path / "page")]) == 0
    found = last_json(capsys)
    assert (found["num_steps"], found["guidance"]) == (5, 7.5)
    assert "5 steps, true_cfg_scale 7.5" in (tmp_path / "page" / "index.html").read_text()
    assert main(["generate", "--run", config.output, "--output", str(tmp_path / "asked"), *ASKED]) == 0
    assert "5 steps, true_cfg_scale 7.5" in capsys.readouterr().out
    assert steps == [5, 5, 5]
    by_hand = ("evaluate.num_steps=null", "evaluate.guidance=null", "rollout.num_steps=5", "model.true_cfg_scale=7.5")
    assert main(["generate", "--run", config.output, "--output", str(tmp_path / "by_hand"), *by_hand]) == 0
    plain = ("evaluate.num_steps=null", "evaluate.guidance=null")
    assert main(["generate", "--run", config.output, "--output", str(tmp_path / "plain"), *plain]) == 0
    for number in range(5):
        asked, same, other = (
            (tmp_path / name / f"{number:05d}.png").read_bytes() for name in ("asked", "by_hand", "plain")
        )
        assert asked == same != other


def test_classifier_free_guidance_of_evaluation_alone(parts: Path, tmp_path: Path) -> None:
    """Also from a cache without text encoders: `leapalign cache` encodes the negative prompt for it."""
    save_stable_diffusion_3(tmp_path / "sd3")
    config = config_of(parts, tmp_path, "evaluate.guidance=4", f"model.path={tmp_path / 'sd3'}")
    file = tmp_path / "config.yaml"
    save_config(config, file)
    cache = str(tmp_path / "cache")
    assert main(["cache", "--config", str(file), "--output", cache]) == 0
    asked = as_evaluated(
        config_of(parts, tmp_path, "evaluate.guidance=4", f"model.path={tmp_path / 'sd3'}", f"prompts.cache={cache}")
    )
    embeddings = embeddings_of(asked, ["a circle"])
    assert embeddings.scale == 4
    model = load_model(asked.model)
    plain = encode_prompts(config.model, ["a circle"])
    guided, unguided = (generate(model, one, [0], 2) for one in (embeddings, plain))
    assert not torch.allclose(guided, unguided)
