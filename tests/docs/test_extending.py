"""docs/extending.md keeps its word: its reward and its backbone train, together, through the command line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from leapalign import cli
from leapalign.models import FAMILIES
from leapalign.models.weights import read_weights
from leapalign.rewards import REWARDS
from leapalign.runs.checkpoint import TRANSFORMER, latest_checkpoint
from leapalign.runs.run_folder import read_metrics

EXAMPLES = re.findall(
    r"```python\n(.*?)```", (Path(__file__).parents[2] / "docs" / "extending.md").read_text(), flags=re.S
)


@pytest.fixture
def example() -> Iterator[dict[str, Any]]:
    """Runs the page, which registers a reward and a family; they are gone after the test."""
    kept = [(registry, dict(registry)) for registry in (FAMILIES, REWARDS)]
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile("\n".join(EXAMPLES), "docs/extending.md", "exec", dont_inherit=True), names)
    yield names
    for registry, before in kept:
        registry.clear()
        registry.update(before)


@pytest.mark.parametrize("asked", [(), ("model.lora_targets=[letters]", "model.lora_rank=8")], ids=["full", "lora"])
def test_the_page_trains(example: dict[str, Any], tmp_path: Path, asked: tuple[str, ...]) -> None:
    folder = tmp_path / "model"
    torch.manual_seed(0)
    network = example["Mixer"]()
    network.save_pretrained(folder / "transformer")
    FlowMatchEulerDiscreteScheduler(shift=2.0).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "MixerPipeline"}))
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    config = tmp_path / "config.yaml"
    config.write_text(
        f"output: {tmp_path / 'run'}\nthreshold: 0.0\nmodel: {{path: {folder}, height: 8, width: 8}}\n"
        f"prompts: {{path: {tmp_path / 'prompts.txt'}}}\nreward: {{name: brightness, goal: 0.9}}\n"
        "rollout: {num_steps: 5, batch_size: 8}\noptimizer: {learning_rate: 0.03}\n"
        "train: {batch_size: 8, iterations: 20}\nsamples: {count: 2}\n"
    )
    assert cli.main(["train", "--config", str(config), *asked]) == 0
    rewards = [record["reward"] for record in read_metrics(tmp_path / "run")]
    assert rewards[-1] > rewards[0] + (0.003 if asked else 0.03)
    checkpoint = latest_checkpoint(tmp_path / "run")
    assert checkpoint is not None
    trained = read_weights(checkpoint / TRANSFORMER)
    assert asked or not torch.equal(trained["out.weight"], network.state_dict()["out.weight"])
    assert cli.main(["memory", "--config", str(config), *asked]) == 0
