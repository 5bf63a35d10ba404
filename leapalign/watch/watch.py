"""The watch on reward hacking: held-out prompts, drawn by the weight average, scored and measured."""

from __future__ import annotations

import dataclasses
import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leapalign.config import Config
from leapalign.evaluation.generate import sample, sampling_progress
from leapalign.inputs.validation import UserError
from leapalign.memory.placement import lent_device
from leapalign.memory.residency import host_memory
from leapalign.models.protocol import FlowModel
from leapalign.parallel.processes import first, share
from leapalign.prompts.files import read_prompts
from leapalign.reward_gradient import RewardFn, RewardTerm, scores_of
from leapalign.rewards import get_reward, reward_terms
from leapalign.storage.embedded import resolve
from leapalign.storage.faults import point
from leapalign.watch import image_statistics as statistics
from leapalign.watch.base import load_base, save_base
from leapalign.watch.metrics import OF_IMAGES, metric_names
from leapalign.watch.records import FILE, read_watch
from leapalign.watch.rules import Stop, StopRule, first_to_hold

SEED = 3_000_000
"""Of the first image's noise, in every run."""
_log = logging.getLogger("leapalign")


def held_out_rewards(config: Config, make: Callable[..., RewardFn] = get_reward) -> dict[str, RewardFn]:
    """``watch.rewards`` by name, made by ``make(name, **options)``; empty without any. Raises UserError as it."""
    if not config.watch.rewards:
        return {}
    terms = reward_terms(dataclasses.replace(config, reward=list(config.watch.rewards)), make)
    return {term.name: term.reward for term in terms}


@dataclass
class Watch:
    """Held-out ``prompts``, of which ``embeddings[i]`` belongs to ``prompts[i]``, ``rewards`` by name that are not
    trained on, and what the base gave."""

    config: Config
    prompts: list[str]
    rewards: dict[str, RewardFn]
    rules: list[StopRule]
    embeddings: Any = None
    base_latents: Tensor | None = None
    """``(N, ...)`` in host memory, from iteration 0 on."""
    base: dict[str, float] | None = None
    """The record of iteration 0."""
    stop: Stop | None = None
    """The rule that held at the last measurement, if one did."""

    @classmethod
    def from_config(cls, config: Config) -> Watch | None:
        """None where ``config`` has no watch. Raises UserError for rules, prompts and rewards that cannot be used."""
        watch = config.watch
        if not watch.every:
            return None
        rules = [StopRule.parsed(text, metric_names(config)) for text in watch.stop_when]
        _refuse_trained(config)
        file = Path(resolve(str(watch.prompts)))
        if not file.exists():
            raise UserError(f"watch.prompts '{file}' does not exist; correct the path")
        prompts = read_prompts(file)
        return cls(config, prompts, held_out_rewards(config), rules)

    def warn_of_trained(self, trained: Sequence[str]) -> None:
        """Warns where prompts of the watch are among those that are trained on, whatever white space parts words."""
        shared = set(map(_spaced, self.prompts)) & set(map(_spaced, trained))
        if shared:
            _log.warning("%d of watch.prompts are trained on, and so not held out, as '%s'", len(shared), min(shared))

    def due(self, iteration: int) -> bool:
        """Whether to measure after ``iteration``: every so often, and after the last."""
        return iteration % self.config.watch.every == 0 or iteration == self.config.train.iterations

    def recall(self, iteration: int) -> None:
        """Takes up what the run folder holds, for a run that goes on after ``iteration``.

        Raises UserError where it lacks the base, or this was made otherwise.
        """
        run = Path(self.config.output)
        records = [record for record in read_watch(run) if record["iteration"] <= iteration]
        if not records or records[0]["iteration"] != 0:
            raise UserError(
                f"'{run}' was not watched from its start, so there is nothing to compare with: {FILE} has no iteration "
                "0; set watch.every=0, or choose another output"
            )
        self.base, self.base_latents = records[0], load_base(run, self.config, self.prompts)
        for rule in self.rules:
            for record in (self.base, records[-1]):
                if rule.metric not in record:
                    raise UserError(
                        f"watch.stop_when '{rule.text}': '{run}' did not measure {rule.metric} from its start; leave "
                        "this rule out"
                    )
        self.stop = first_to_hold(self.rules, records[-1], self.base)

    def look(self, iteration: int, model: FlowModel, trained: Sequence[RewardTerm]) -> dict[str, float]:
        """Measures what ``model`` draws with the weights it holds, and tells by ``stop`` whether a rule holds.

        trained: the rewards of the run. At iteration 0 it also keeps the base. Returns a record of means over all
        images: ``iteration``, `metric_names`. Raises UserError where the base cannot be written.
        """
        if iteration == 0:
            self.base_latents = None
        metrics, latents = self._measured(model, trained)
        record = {"iteration": iteration, **metrics}
        if iteration == 0:
            with host_memory("latents"):
                self.base, self.base_latents = record, torch.cat(latents)
            if first():
                save_base(Path(self.config.output), self.base_latents, self.config, self.prompts)
        assert self.base is not None, "recall comes first"
        self.stop = first_to_hold(self.rules, record, self.base)
        return record

    @torch.no_grad()
    def _measured(self, model: FlowModel, trained: Sequence[RewardTerm]) -> tuple[dict[str, float], list[Tensor]]:
        """`metric_names` with their means; the latents of each batch, unless the base's are known."""
        config = self.config
        count, size = len(self.prompts) * config.watch.seeds, share(config.rollout.batch_size)
        sigmas = model.sigmas(config.rollout.num_steps, config.rollout.sigmas)
        columns, smalls, made = defaultdict[str, list[Tensor]](list), list[Tensor](), list[Tensor]()
        with (
            lent_device(self.rewards.values(), model.device),
            sampling_progress("watch", count, size, config.rollout.num_steps) as step,
        ):
            for start in range(0, count, size):
                part = slice(start, min(start + size, count))
                chosen = torch.arange(part.start, part.stop) // config.watch.seeds
                seeds = range(SEED + part.start, SEED + part.stop)
                latents, images = sample(model, self.embeddings[chosen], seeds, sigmas, step)
                found = self._scores(trained, images, [self.prompts[index] for index in chosen.tolist()])
                found |= {name: statistic(images) for name, statistic in OF_IMAGES.items()}
                if self.base_latents is None:
                    # Copied, or each batch would keep its whole rollout.
                    with host_memory("latents"):
                        made.append(latents.to("cpu", copy=True))
                    found["drift"] = torch.zeros(len(latents), device=model.device)
                else:
                    base = self.base_latents[part].to(latents.device, non_blocking=True)
                    found["drift"] = statistics.drift(latents, base)
                for name, column in found.items():
                    columns[name].append(column)
                smalls.append(statistics.small(images))
                point("watch")
        of_prompts = torch.cat(smalls).unflatten(0, (len(self.prompts), config.watch.seeds))
        means = {name: torch.cat(parts).mean() for name, parts in columns.items()}
        means["diversity"] = statistics.diversity(of_prompts).mean()
        names = metric_names(config)
        # The device is waited for once.
        values = torch.stack([means[name] for name in names]).tolist()
        return dict(zip(names, values, strict=True)), made

    def _scores(self, terms: Sequence[RewardTerm], images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """``held_out_*`` of each image, ``(B,)``, on the device of ``images``."""
        trained = []
        for term in terms:
            with term.lend():
                trained.append(scores_of(term.reward, images, prompts).to(images.device, torch.float32))
        found = {"held_out_reward": reduce(torch.add, [t.weight * s for t, s in zip(terms, trained, strict=True)])}
        if len(terms) > 1:
            found |= {f"held_out_reward_{t.name}": scores for t, scores in zip(terms, trained, strict=True)}
        others = {name: scores_of(reward, images, prompts) for name, reward in self.rewards.items()}
        return found | {f"held_out_{name}": s.to(images.device, torch.float32) for name, s in others.items()}


def _spaced(prompt: str) -> str:
    """One space between words, as most tokenizers have it."""
    return " ".join(prompt.split())


def _refuse_trained(config: Config) -> None:
    """Raises UserError where a reward of the watch is trained on: it is scored anyway."""
    trained = [{k: v for k, v in one.items() if k not in ("threshold", "weight")} for one in config.rewards]
    for settings in config.watch.rewards:
        if settings in trained:
            raise UserError(
                f"watch.rewards names '{settings['name']}', which is trained on and measured as held_out_reward; leave "
                "it out"
            )
