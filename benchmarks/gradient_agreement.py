"""How well each method's gradient agrees with backpropagation through the whole sampler, on the tiny world.

    python benchmarks/gradient_agreement.py --rollouts 12 > benchmarks/results/gradient_agreement.jsonl
    python benchmarks/tables.py docs/methods.md

Rollouts of the shipped model and reward, 25 steps. A method draws one set of steps for a whole rollout, so that its
gradient has a noise level: the sigma of the noisiest step that carries gradient. Cosine and norm ratio are those of
the gradients of all parameters, the mean over the rollout's images, to two others of the unweighted loss: the true
gradient, and the sum of its direct terms, those that reach a velocity through no other. Of all noise levels together
also: the mean cosine of a method's gradients on two rollouts, and the share of the sum of its images' gradient norms
that the largest twentieth of the images holds. One JSON object for each method and band of noise levels, with means
and standard errors over rollouts and draws.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from leap_kernels.tools.report import provenance
from torch import Tensor

from leapalign.config import ModelConfig
from leapalign.method_gradient import Objective, method_backward
from leapalign.methods import Method, get_method
from leapalign.methods.draft_k import DRaFTK
from leapalign.models import encode_prompts, load_model
from leapalign.models.velocity import PromptedVelocity
from leapalign.reward_gradient import RewardTerm
from leapalign.rewards import get_reward
from leapalign.rollout import Rollout, sample_rollout
from leapalign.surrogate import surrogate_backward
from leapalign.tiny.world import all_prompts, balanced_prompts

NUM_STEPS, BATCH_SIZE, THRESHOLD, DRAWS = 25, 16, 1.0, 6
BANDS, ALL = ((0.0, 0.5), (0.5, 0.8), (0.8, 0.95), (0.95, 1.01)), (0.0, 1.01)
LARGEST = 0.05
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


@dataclass(frozen=True)
class Compared:
    """A method's gradient on one rollout: its noise level, and cosine and norm ratio to another, by whose it is."""

    level: float
    cosine: dict[str, float]
    norm_ratio: dict[str, float]


@dataclass
class OfMethod:
    """What is known of the gradients of one method."""

    compared: list[Compared] = field(default_factory=list)
    directions: list[Tensor] = field(default_factory=list)
    """Of unit norm, the first draw's of each rollout."""
    image_norms: list[float] = field(default_factory=list)

    def between_rollouts(self) -> float:
        """The mean cosine of two."""
        count = len(self.directions)
        return (float(torch.stack(self.directions).sum(0).square().sum()) - count) / (count * (count - 1))

    def largest_share(self) -> float:
        """Of the sum of the images' norms, the largest `LARGEST` of them."""
        norms = sorted(self.image_norms, reverse=True)
        return sum(norms[: max(1, round(LARGEST * len(norms)))]) / sum(norms)


class Batch:
    """One rollout of the base model, and gradients of it, flat and in float64."""

    def __init__(self, model: Any, embeddings: Any, prompts: list[str], seeds: range, objective: Objective) -> None:
        self.parameters = list(model.transformer.parameters())
        self.velocity = PromptedVelocity(model, embeddings)
        self.rollout = sample_rollout(self.velocity, model.draw_noise(seeds), model.sigmas(NUM_STEPS))
        self.prompts, self.objective = prompts, objective

    def reference(self, discount: float) -> Tensor:
        """Of all steps: the true gradient with discount 1, the sum of direct terms with 0."""
        rollout = self.rollout
        plan = DRaFTK(steps=None).plan(rollout.sigmas, first=torch.zeros(rollout.batch_size, dtype=torch.int64))
        scaled = replace(plan, discount=plan.discount * discount)
        surrogate_backward(scaled, rollout, self.velocity, self.objective.true_gradient(rollout, self.prompts))
        return self._taken()

    def of(self, method: Method, indices: dict[str, Tensor]) -> Tensor:
        method_backward(method, indices, self.rollout, self.velocity, self.objective, self.prompts)
        return self._taken()

    def of_each(self, method: Method, indices: dict[str, Tensor]) -> Iterator[Tensor]:
        """Each image's, with steps of its own."""
        whole = self.rollout
        for number, prompt in enumerate(self.prompts):
            one = slice(number, number + 1)
            rollout = Rollout(whole.latents[:, one], whole.velocities[:, one], whole.sigmas)
            own = {name: value[..., one] for name, value in indices.items()}
            velocity = self.velocity.select(torch.tensor([number]))
            method_backward(method, own, rollout, velocity, self.objective, [prompt])
            yield self._taken()

    def _taken(self) -> Tensor:
        flat = torch.cat([p.grad.flatten() for p in self.parameters if p.grad is not None])
        for parameter in self.parameters:
            parameter.grad = None
        return flat.double()


def compare(rollouts: int) -> list[OfMethod]:
    """What `METHODS` give, in their order."""
    prompts = [prompt.text for prompt in balanced_prompts(all_prompts(), BATCH_SIZE * rollouts)]
    model = load_model(ModelConfig())
    embeddings = encode_prompts(ModelConfig(), prompts)
    reward = get_reward("pickscore", path="embedded:reward", scale="probability")
    objective = Objective(model.decode, [RewardTerm("pickscore", reward, THRESHOLD)])
    found = [OfMethod() for _ in METHODS]
    for number in range(rollouts):
        part = slice(number * BATCH_SIZE, (number + 1) * BATCH_SIZE)
        batch = Batch(model, embeddings[part], prompts[part], range(part.start, part.stop), objective)
        references = {"true": batch.reference(1), "direct": batch.reference(0)}
        for (name, options), of_method in zip(METHODS, found, strict=True):
            method = get_method(name, **options)
            generator = torch.Generator().manual_seed(number)
            for draw in range(1 if name in ("draft_k", "draft_lv") else DRAWS):
                drawn = method.draw(NUM_STEPS, BATCH_SIZE, generator)
                indices = for_all(drawn)
                own = batch.of(method, indices)
                cosine = {of: float(torch.cosine_similarity(own, other, dim=0)) for of, other in references.items()}
                ratio = {of: float(own.norm() / other.norm()) for of, other in references.items()}
                of_method.compared.append(Compared(noise_level(method, batch.rollout.sigmas, indices), cosine, ratio))
                if draw == 0:
                    of_method.directions.append((own / own.norm()).float())
                    of_method.image_norms += [float(one.norm()) for one in batch.of_each(method, drawn)]
    return found


def summarised(found: list[OfMethod]) -> Iterator[dict[str, Any]]:
    """A line for each method and band, and one for all bands together."""
    for (name, options), of_method in zip(METHODS, found, strict=True):
        for low, high in (*BANDS, ALL):
            chosen = [one for one in of_method.compared if low <= one.level < high]
            if not chosen:
                continue
            cosines, direct = ([one.cosine[of] for one in chosen] for of in ("true", "direct"))
            together = {"between_rollouts": of_method.between_rollouts(), "largest_share": of_method.largest_share()}
            yield {
                "method": name,
                "options": options,
                "sigma": [low, min(high, 1.0)],
                "count": len(chosen),
                "cosine": statistics.fmean(cosines),
                "cosine_error": statistics.stdev(cosines) / len(cosines) ** 0.5 if len(cosines) > 1 else None,
                "norm_ratio": statistics.fmean(one.norm_ratio["true"] for one in chosen),
                "direct_cosine": statistics.fmean(direct),
                "direct_norm_ratio": statistics.fmean(one.norm_ratio["direct"] for one in chosen),
                **(together if (low, high) == ALL else {}),
            }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=12)
    arguments = parser.parse_args()
    about = {"rollouts": arguments.rollouts, "batch_size": BATCH_SIZE, "num_steps": NUM_STEPS, **provenance()}
    for line in summarised(compare(arguments.rollouts)):
        print(json.dumps({**line, **about}))
