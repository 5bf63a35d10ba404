"""Where does a reward's gradient lead? Generated latents climb it through the decoder, without the model.

What a training run follows is this gradient. Climbed on latents alone it costs a small part of a run, and shows the
same: pictures that suit their prompts better, by rewards that are not climbed too, or texture that only this one likes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from leapalign.config import Config
from leapalign.evaluation.generate import batches, sampling_model
from leapalign.evaluation.statistics import Interval, mean_interval
from leapalign.inputs.prompt_limits import warn_of_cut
from leapalign.memory.placement import place_for_climbing, training_device
from leapalign.method_gradient import Objective
from leapalign.prompts.embeddings import embeddings_to_sample
from leapalign.reports.progress import progress
from leapalign.reward_gradient import RewardFn, scores_of
from leapalign.rewards import reward_terms
from leapalign.rollout import per_sample
from leapalign.watch import image_statistics as statistics
from leapalign.watch.metrics import OF_IMAGES
from leapalign.watch.watch import held_out_rewards

STEP = 0.025
"""Length of a step, in lengths of the generated latents."""
LOOKS = 4
"""How often a climb is looked at, beside its start."""
CLIMBED, HELD_OUT, MOVED, LENGTH = "reward", "held_out", "drift", "norm"


@dataclass(frozen=True)
class Climb:
    """What ``steps`` steps made of N images: ``images (N, 3, H, W)`` on the CPU, in [0, 1], and ``values``, one
    ``(N,)`` a name: ``reward_NAME`` of each climbed reward, ``held_out_NAME`` of others, `OF_IMAGES`, ``drift`` of
    the latents and their ``norm``, both in lengths of the generated ones."""

    steps: int
    images: Tensor
    values: Mapping[str, Tensor]


def ascent(objective: Objective, latents: Tensor, prompts: Sequence[str], length: Tensor) -> Tensor:
    """``x + STEP |x_0| g / |g|`` of each of ``latents (B, ...)``, ``g = sum_r w_r dr/dx``: uphill in the weighted
    sum of ``objective``'s rewards; where ``g`` is 0, x. length: ``(B,)``, of the generated latents ``x_0``."""
    scored = objective.score(latents, prompts)
    gradient = sum(term.weight * one.gradient for term, one in zip(objective.terms, scored, strict=True))
    assert isinstance(gradient, Tensor)
    gradient = gradient.double()  # where a reward is flat, the squares of float32 would be 0
    size = gradient.flatten(1).norm(dim=1).clamp(min=torch.finfo(torch.float64).tiny)
    return latents + (per_sample(STEP * length / size, gradient) * gradient).to(latents)


def climb(
    objective: Objective,
    held_out: Mapping[str, RewardFn],
    latents: Tensor,
    prompts: Sequence[str],
    looks: Sequence[int],
    batch_size: int,
    done: Callable[[], object] = lambda: None,
) -> Iterator[Climb]:
    """Climbs from generated ``latents (N, ...)``, latent n made for ``prompts[n]``, and looks after each number of
    steps in ``looks``, ascending from 0. ``done`` is called after each step of a batch."""
    lengths = latents.flatten(1).float().norm(dim=1)
    current = latents.clone()
    parts = [slice(start, start + batch_size) for start in range(0, len(latents), batch_size)]
    taken = 0
    for look in looks:
        for _ in range(look - taken):
            for part in parts:
                current[part] = ascent(objective, current[part], prompts[part], lengths[part])
                done()
        taken = look
        yield _look(objective, held_out, current, latents, prompts, parts, taken)


@torch.no_grad()
def _look(
    objective: Objective,
    held_out: Mapping[str, RewardFn],
    current: Tensor,
    start: Tensor,
    prompts: Sequence[str],
    parts: Sequence[slice],
    steps: int,
) -> Climb:
    rewards = {f"{CLIMBED}_{term.name}": term.reward for term in objective.terms}
    rewards |= {f"{HELD_OUT}_{name}": reward for name, reward in held_out.items()}
    images, columns = list[Tensor](), list[dict[str, Tensor]]()
    for part in parts:
        shown = objective.decode(current[part]).clamp(0, 1)
        found = {name: scores_of(reward, shown, prompts[part]) for name, reward in rewards.items()}
        found |= {name: statistic(shown) for name, statistic in OF_IMAGES.items()}
        found[MOVED] = statistics.drift(current[part], start[part])
        found[LENGTH] = current[part].flatten(1).float().norm(dim=1) / start[part].flatten(1).float().norm(dim=1)
        columns.append({name: value.float().cpu() for name, value in found.items()})
        images.append(shown.float().cpu())
    return Climb(
        steps, torch.cat(images), {name: torch.cat([column[name] for column in columns]) for name in columns[0]}
    )


def probe(config: Config, prompts: Sequence[str], steps: int, seed: int) -> list[Climb]:
    """Generates an image for each of ``prompts``, image i from ``seed + i``, and climbs ``steps`` steps.

    Climbed is the weighted sum of ``config``'s rewards; ``watch.rewards`` look on. Raises UserError for what cannot be
    read, before any long work.
    """
    terms = reward_terms(config)
    held_out = held_out_rewards(config)
    warn_of_cut([(f"reward {term.name}", term.reward) for term in terms], lambda: prompts)
    model = sampling_model(config, None)
    embeddings, seeds = embeddings_to_sample(config, list(prompts)), range(seed, seed + len(prompts))
    size = config.rollout.batch_size
    sigmas = model.sigmas(config.rollout.num_steps, config.rollout.sigmas)
    generated = batches(model, embeddings, seeds, sigmas, size, "probe, images")
    latents = torch.cat([made for made, _ in generated])
    rewards = [*(term.reward for term in terms), *held_out.values()]
    place_for_climbing(model, rewards, config.memory, training_device())
    objective = Objective.of(config, model.decode, terms)
    looks = sorted({round(steps * share / LOOKS) for share in range(LOOKS + 1)})
    with progress("probe, climb", steps * math.ceil(len(prompts) / size), "step") as bar:
        return list(climb(objective, held_out, latents, prompts, looks, size, bar.update))


def changes(climbs: Sequence[Climb]) -> dict[str, list[Interval]]:
    """By name, at each look the mean change since the first, image by image, with its 95 % interval."""
    first = climbs[0].values
    return {name: [mean_interval((one.values[name] - first[name]).tolist()) for one in climbs] for name in first}


def verdict(climbs: Sequence[Climb]) -> str:
    """One sentence: whether rewards that are not climbed rose as well."""
    found = {name: of[-1] for name, of in changes(climbs).items()}
    climbed = [change for name, change in found.items() if name.startswith(CLIMBED)]
    others = {name.removeprefix(f"{HELD_OUT}_"): of for name, of in found.items() if name.startswith(HELD_OUT)}
    broken = [name for name, change in found.items() if not math.isfinite(change.mean)]
    if broken:
        return f"No judgement: {', '.join(broken)} became numbers that are not finite; look into the reward first."
    if not any(change.low > 0 for change in climbed):
        if any(change.mean > 0 for change in climbed):
            return "Unclear: the climbed reward did not rise beyond chance; probe more images, or more steps."
        return "The reward does not rise along its own gradient: there is nothing to train on."
    if not others:
        return "No other reward was asked: name some in watch.rewards, or judge by the pictures."
    fell = [name for name, change in others.items() if change.high < 0]
    if fell:
        return f"The gradient leads away from good pictures: {', '.join(fell)} fell while the climbed reward rose."
    unclear = [name for name, change in others.items() if change.low <= 0]
    if unclear:
        return f"Unclear: {', '.join(unclear)} did not change beyond chance; probe more images, and look at them."
    return f"The gradient leads to better pictures: {', '.join(others)} rose as well."
