"""What is lost where the gradients of an iteration add up in bfloat16, beside sums in float32.

    python benchmarks/gradient_accumulation.py > benchmarks/results/gradient_accumulation.jsonl

The tiny FLUX in bfloat16: as many backward passes as an iteration of the profile ``flux1_dev/80gb`` adds up, each that
of leaps on other images. One JSON object for 2, 8 and 32 of them: the relative error of the sum, the cosine of the two
sums, and the ratio of their norms.
"""

from __future__ import annotations

import json

import torch
from leap_kernels.tools.report import provenance
from torch import Tensor

from leapalign.config import ModelConfig
from leapalign.method_gradient import Objective, method_backward
from leapalign.methods import get_method
from leapalign.models import encode_prompts, load_model
from leapalign.models.velocity import prompted_velocity
from leapalign.reward_gradient import RewardTerm
from leapalign.rewards import get_reward
from leapalign.rollout import sample_rollout
from leapalign.tiny.world import all_prompts, balanced_prompts

NUM_STEPS, BATCH_SIZE, PASSES = 25, 2, (2, 8, 32)


def main() -> None:
    config = ModelConfig(dtype="bfloat16")
    model = load_model(config)
    prompts = [prompt.text for prompt in balanced_prompts(all_prompts(), BATCH_SIZE * PASSES[-1] // 2)]
    embeddings = encode_prompts(config, prompts)
    reward = get_reward("pickscore", path="embedded:reward", scale="probability")
    objective = Objective(model.decode, [RewardTerm("pickscore", reward, 1.0)])
    method, generator = get_method("leapalign"), torch.Generator().manual_seed(0)
    narrow: dict[Tensor, Tensor] = {}
    wide: dict[Tensor, Tensor] = {}
    passes = 0

    def add(parameter: Tensor, gradient: Tensor) -> None:
        narrow[parameter] = narrow[parameter] + gradient if parameter in narrow else gradient
        wide[parameter] = wide[parameter] + gradient.float() if parameter in wide else gradient.float()

    # A rollout is two backward passes: one a leap.
    for number in range(PASSES[-1] // 2):
        part = slice(number * BATCH_SIZE, (number + 1) * BATCH_SIZE)
        velocity = prompted_velocity(model, embeddings[part])
        rollout = sample_rollout(velocity, model.draw_noise(range(part.start, part.stop)), model.sigmas(NUM_STEPS))
        indices = method.draw(NUM_STEPS, BATCH_SIZE, generator)
        method_backward(method, indices, rollout, velocity, objective, prompts[part], gradient_sink=add)
        passes += 2
        if passes in PASSES:
            sums = (torch.cat([total[p].double().flatten() for p in wide]) for total in (narrow, wide))
            rounded, exact = sums
            line = {
                "passes": passes,
                "relative_error": float((rounded - exact).norm() / exact.norm()),
                "cosine": float(torch.nn.functional.cosine_similarity(rounded, exact, dim=0)),
                "norm_ratio": float(rounded.norm() / exact.norm()),
            }
            print(json.dumps({**line, **provenance()}))


if __name__ == "__main__":
    main()
