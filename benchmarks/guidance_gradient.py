"""What `model.cfg_gradient: detached` leaves of the gradient, on the tiny world's base model under guidance.

    python benchmarks/guidance_gradient.py --rollouts 3 > benchmarks/results/guidance_gradient.jsonl

Cosines of each method's gradient to exact backpropagation through the whole sampler, with all of the guided velocity's
gradient and with the prompt's part alone, and of the two to each other; means over rollouts and draws. One JSON object
for each method.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from statistics import mean
from typing import Any

import torch
from leap_kernels.tools.report import provenance
from torch import Tensor

from leapalign.config import ModelConfig
from leapalign.diagnostics.true_gradient import true_gradient
from leapalign.method_gradient import Objective, method_backward
from leapalign.methods import get_method
from leapalign.models import encode_prompts, load_model
from leapalign.models.velocity import prompted_velocity
from leapalign.reward_gradient import RewardTerm
from leapalign.rewards import get_reward
from leapalign.rollout import sample_rollout
from leapalign.tiny.world import all_prompts, balanced_prompts

SCALE, NUM_STEPS, BATCH_SIZE, DRAWS, THRESHOLD = 3.5, 25, 4, 2, 1.0
METHODS: tuple[tuple[str, dict[str, Any]], ...] = (("draft_k", {"steps": 1}), ("flowbp_sparse", {}), ("leapalign", {}))
FULL, DETACHED, BOTH = "full", "detached", "detached_to_full"


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a, b, dim=0))


def compare(rollouts: int) -> dict[int, dict[str, list[float]]]:
    """Of each method, by its number, the cosines ``FULL`` and ``DETACHED`` to the true gradient, and ``BOTH``."""
    config = ModelConfig(true_cfg_scale=SCALE)
    prompts = [prompt.text for prompt in balanced_prompts(all_prompts(), BATCH_SIZE * rollouts)]
    model, embeddings = load_model(config), encode_prompts(config, prompts)
    reward = get_reward("pickscore", path="embedded:reward", scale="probability")
    objective = Objective(model.decode, [RewardTerm("pickscore", reward, THRESHOLD)])
    parameters = list(model.transformer.parameters())
    found: dict[int, dict[str, list[float]]] = {
        number: {name: [] for name in (FULL, DETACHED, BOTH)} for number in range(len(METHODS))
    }
    for rollout_number in range(rollouts):
        part = slice(rollout_number * BATCH_SIZE, (rollout_number + 1) * BATCH_SIZE)
        velocities = {
            name: prompted_velocity(model, dataclasses.replace(embeddings[part], gradient=name))
            for name in (FULL, DETACHED)
        }
        noise = model.draw_noise(range(part.start, part.stop))
        rollout = sample_rollout(velocities[FULL], noise, model.sigmas(NUM_STEPS, "pipeline"))
        at_images = objective.true_gradient(rollout, prompts[part])
        true = true_gradient(rollout, velocities[FULL], at_images)
        exact = torch.cat([true[parameter].flatten() for parameter in parameters])
        for number, (name, options) in enumerate(METHODS):
            method = get_method(name, **options)
            for draw in range(DRAWS):
                indices = method.draw(NUM_STEPS, BATCH_SIZE, torch.Generator().manual_seed(10 * rollout_number + draw))
                made = {}
                for kind, velocity in velocities.items():
                    method_backward(method, indices, rollout, velocity, objective, prompts[part])
                    made[kind] = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
                    model.transformer.zero_grad(set_to_none=True)
                    found[number][kind].append(cosine(made[kind], exact))
                found[number][BOTH].append(cosine(made[DETACHED], made[FULL]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=3)
    arguments = parser.parse_args()
    for number, cosines in compare(arguments.rollouts).items():
        method, options = METHODS[number]
        line = {"method": method, **options, "scale": SCALE, "draws": arguments.rollouts * DRAWS}
        print(json.dumps({**line, **{name: mean(values) for name, values in cosines.items()}, **provenance()}))


if __name__ == "__main__":
    main()
