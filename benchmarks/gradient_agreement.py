"""How well each method's gradient agrees with backpropagation through the whole sampler, on the tiny world.

    python benchmarks/gradient_agreement.py --rollouts 12 > benchmarks/results/gradient_agreement.jsonl
    python benchmarks/tables.py docs/methods.md

Rollouts of the shipped model and reward, 25 steps. A method draws one set of steps for a whole rollout, so that its
gradient has a noise level: the sigma of the noisiest step that carries gradient. Cosine and norm ratio are those of
the gradients of all parameters, the mean over the rollout's images; the true gradient is that of the unweighted loss.
One JSON object for each method and band of noise levels, with means and standard errors over rollouts and draws.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from typing import Any

import torch
from leap_kernels.tools.report import provenance
from torch import Tensor

from leapalign.config import ModelConfig
from leapalign.diagnostics.true_gradient import true_gradient
from leapalign.method_gradient import Objective, method_backward
from leapalign.methods import Method, get_method
from leapalign.models import encode_prompts, load_model
from leapalign.models.velocity import PromptedVelocity
from leapalign.reward_gradient import RewardTerm
from leapalign.rewards import get_reward
from leapalign.rollout import sample_rollout
from leapalign.tiny.world import all_prompts, balanced_prompts

NUM_STEPS, BATCH_SIZE, THRESHOLD, DRAWS = 25, 16, 1.0, 6
BANDS = ((0.0, 0.5), (0.5, 0.8), (0.8, 0.95), (0.95, 1.01))
METHODS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("refl", {}),
    ("draft_lv", {}),
    ("draft_k", {"steps": 1}),
    ("draft_k", {"steps": 5}),
    ("draft_k", {"steps": 25}),
    ("drtune", {}),
    ("leapalign", {"leaps": 1}),
    ("leapalign", {"alpha": 0.0}),
    ("leapalign", {"alpha": 0.3}),
    ("leapalign", {"alpha": 1.0}),
    ("leapalign", {"alpha": 0.3, "leaps": 3}),
    ("leapalign", {"alpha": 0.3, "reward_on": "posterior_mean"}),
    ("flowbp_sparse", {}),
    ("flowbp_bridge", {}),
    ("flowbp_lagrange", {}),
)


def for_all(drawn: dict[str, Tensor]) -> dict[str, Tensor]:
    """One set of steps for every image; noise seeds stay an image's own."""
    return {
        name: value if name == "noise_seed" else value[..., :1].expand(*value.shape[:-1], BATCH_SIZE)
        for name, value in drawn.items()
    }


def noise_level(method: Method, sigmas: Tensor, indices: dict[str, Tensor]) -> float:
    """Sigma of the noisiest step with gradient."""
    plan = method.plan(sigmas, **indices)
    return float(sigmas[plan.index[plan.coefficient != 0].min()])


def compare(rollouts: int) -> Iterator[tuple[int, float, float, float]]:
    """Yields the number of a method, a noise level, and cosine and norm ratio to the true gradient."""
    prompts = [prompt.text for prompt in balanced_prompts(all_prompts(), BATCH_SIZE * rollouts)]
    model = load_model(ModelConfig())
    embeddings = encode_prompts(ModelConfig(), prompts)
    objective = Objective(
        model.decode,
        [RewardTerm("pickscore", get_reward("pickscore", path="embedded:reward", scale="probability"), THRESHOLD)],
    )
    parameters = list(model.transformer.parameters())
    sigmas = model.sigmas(NUM_STEPS)
    for number in range(rollouts):
        part = slice(number * BATCH_SIZE, (number + 1) * BATCH_SIZE)
        velocity = PromptedVelocity(model, embeddings[part])
        rollout = sample_rollout(velocity, model.draw_noise(range(part.start, part.stop)), sigmas)
        exact = true_gradient(rollout, velocity, objective.true_gradient(rollout, prompts[part]))
        true = torch.cat([exact[parameter].flatten() for parameter in parameters])
        for index, (name, options) in enumerate(METHODS):
            method = get_method(name, **options)
            generator = torch.Generator().manual_seed(number)
            for _ in range(1 if name in ("draft_k", "draft_lv") else DRAWS):
                indices = for_all(method.draw(NUM_STEPS, BATCH_SIZE, generator))
                method_backward(method, indices, rollout, velocity, objective, prompts[part])
                own = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
                model.transformer.zero_grad(set_to_none=True)
                cosine = torch.nn.functional.cosine_similarity(own.double(), true.double(), dim=0)
                yield index, noise_level(method, sigmas, indices), float(cosine), float(own.norm() / true.norm())


def summarised(found: list[tuple[int, float, float, float]]) -> Iterator[dict[str, Any]]:
    """A line for each method and band, and one for all bands together."""
    for index, (name, options) in enumerate(METHODS):
        for low, high in (*BANDS, (0.0, 1.01)):
            chosen = [(cosine, ratio) for i, level, cosine, ratio in found if i == index and low <= level < high]
            if not chosen:
                continue
            cosines, ratios = zip(*chosen, strict=True)
            yield {
                "method": name,
                "options": options,
                "sigma": [low, min(high, 1.0)],
                "count": len(chosen),
                "cosine": statistics.fmean(cosines),
                "cosine_error": statistics.stdev(cosines) / len(cosines) ** 0.5 if len(cosines) > 1 else None,
                "norm_ratio": statistics.fmean(ratios),
            }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=12)
    arguments = parser.parse_args()
    about = {"rollouts": arguments.rollouts, "batch_size": BATCH_SIZE, "num_steps": NUM_STEPS, **provenance()}
    for line in summarised(list(compare(arguments.rollouts))):
        print(json.dumps({**line, **about}))
