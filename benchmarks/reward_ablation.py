"""What of the tiny reward's training earns its place: each part left out once, and what its gradient then leads to.

    python benchmarks/reward_ablation.py --steps 1500                # arms may be named; all of them take an hour

An arm trains a reward from seed 1, climbs it for 30 steps on the latents of generated images (no model), and aligns
the tiny model with it. Appends a line an arm to ``results/reward_ablation.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leapalign.config import load_config
from leapalign.config.profiles import profiles
from leapalign.evaluation.generate import generate
from leapalign.models import encode_prompts, load_model
from leapalign.models.flux import FluxModel
from leapalign.probe.climb import Climb, probe
from leapalign.reports.pages import text_table
from leapalign.rewards.preprocessing import cover
from leapalign.streams import EVALUATION_STREAM, seed_of
from leapalign.tiny.demo import WITNESS
from leapalign.tiny.evaluate import NUM_STEPS, evaluate
from leapalign.tiny.judge import detect, untidiness, verdict
from leapalign.tiny.lessons import draw_lesson
from leapalign.tiny.nearest import SIDE
from leapalign.tiny.train_reward import CLIMBED, SLOPE_WEIGHT, train_reward
from leapalign.tiny.world import all_prompts, balanced_prompts, draw_prompts, prompts_by_text, split_prompts
from leapalign.trainer import Trainer

RESULTS = Path(__file__).parent / "results" / "reward_ablation.jsonl"
SEED, IMAGES, CLIMB_STEPS, ITERATIONS = 1, 96, 30, 60
Draw = Callable[[int, random.Random, torch.Generator], tuple[Tensor, list[str]]]


@dataclass(frozen=True)
class Arm:
    """How a reward is trained."""

    draw: Draw = draw_lesson
    slope_weight: float = SLOPE_WEIGHT
    climbed: int = CLIMBED


def with_generated(count: int, rng: random.Random, generator: torch.Generator, pool: list[Any]) -> tuple[Tensor, Any]:
    """A quarter of a lesson are pictures that the base drew, filled into ``pool`` at the first call."""
    if not pool:
        config = load_config(profiles()["tiny"])
        texts = [prompt.text for prompt in draw_prompts(all_prompts(), 2000, random.Random(SEED))]
        made = generate(load_model(config.model), encode_prompts(config.model, texts), range(2000), NUM_STEPS)
        pool += zip(cover(made, SIDE), texts, strict=True)
    images, prompts = draw_lesson(count - count // 4, rng, generator)
    drawn = rng.sample(pool, count // 4)
    return torch.cat([images, torch.stack([image for image, _ in drawn])]), prompts + [text for _, text in drawn]


ARMS = {
    "all": Arm(),
    "no stains": Arm(draw=partial(draw_lesson, stain=0.0)),
    "no ways between scenes": Arm(draw=partial(draw_lesson, between=0.0)),
    "no climbed pictures": Arm(climbed=0),
    "generated pictures too": Arm(draw=partial(with_generated, pool=[])),
    "plain: values only": Arm(draw=partial(draw_lesson, stain=0.0, between=0.0), slope_weight=0.0, climbed=0),
}


def right(climb: Climb, prompts: list[str]) -> tuple[float, float]:
    """The share of pictures that are exactly right, and their mean untidiness."""
    found = [detect(image.numpy()) for image in climb.images]
    exact = [verdict(seen, prompts_by_text()[text]).exact for seen, text in zip(found, prompts, strict=True)]
    untidy = [untidiness(image.numpy(), seen) for image, seen in zip(climb.images, found, strict=True)]
    return sum(exact) / len(exact), sum(untidy) / len(untidy)


def run_arm(arm: Arm, steps: int, folder: Path) -> dict[str, Any]:
    """Trains, climbs and aligns."""
    reward = f"reward={{name: pickscore, path: {folder}, scale: logit}}"
    overrides = [
        reward,
        f"output={folder}/run",
        f"train.iterations={ITERATIONS}",
        "checkpoint.every=20",
    ]
    config = load_config(profiles()["tiny"], overrides)
    model = load_model(config.model)
    assert isinstance(model, FluxModel)
    train_reward(model, folder, SEED, print, arm.draw, arm.slope_weight, arm.climbed, steps)
    watched = load_config(profiles()["tiny"], [reward, WITNESS])
    texts = [prompt.text for prompt in balanced_prompts(split_prompts()[1], IMAGES)]
    climbs = probe(watched, texts, CLIMB_STEPS, SEED)
    (before, _), (after, untidy) = (right(climb, texts) for climb in (climbs[0], climbs[-1]))

    prompts = balanced_prompts(split_prompts()[1], 432)
    embeddings = encode_prompts(config.model, [prompt.text for prompt in prompts])
    trainer = Trainer.from_config(config)
    for _ in trainer.run():
        pass
    with trainer.optimizer.averaged_weights():
        drawn = evaluate(trainer.model, embeddings, prompts, seed_of(0, EVALUATION_STREAM, 0))
    return {
        "climbed": {"right_before": before, "right_after": after, "untidy": untidy},
        "critic": [float(climb.values["held_out_custom"].mean()) for climb in (climbs[0], climbs[-1])],
        "aligned": {
            "exact": drawn.accuracy().to_json(),
            "clean": drawn.accuracy("clean").mean,
            "untidy": drawn.untidiness().mean,
            "diversity": drawn.diversity(),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", nargs="*", default=list(ARMS), help=", ".join(ARMS))
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--keep", type=Path, help="new folder for the rewards")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in arguments.arms:
            folder = (arguments.keep or Path(scratch)) / name.replace(" ", "_").replace(":", "")
            found = run_arm(ARMS[name], arguments.steps, folder)
            with RESULTS.open("a") as file:
                file.write(json.dumps({"arm": name, "steps": arguments.steps, **found}) + "\n")
            climbed, aligned = found["climbed"], found["aligned"]
            rows.append(
                [
                    name,
                    f"{climbed['right_before']:.2f} to {climbed['right_after']:.2f}",
                    f"{climbed['untidy']:.4f}",
                    f"{found['critic'][0]:.2f} to {found['critic'][1]:.2f}",
                    f"{aligned['exact']['mean']:.3f}",
                    f"{aligned['untidy']:.4f}",
                ]
            )
    print(text_table(("", "climbed: right", "untidy", "critic", "aligned: exact", "untidy"), rows))


if __name__ == "__main__":
    main()
