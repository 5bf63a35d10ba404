"""The training loop: rollout, reward gradient, surrogate backward, optimizer step."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leapalign.cached_rollout import CachedRollout
from leapalign.config import Config
from leapalign.diagnostics.guards import fault_names
from leapalign.diagnostics.threshold import warn_of_thresholds
from leapalign.diagnostics.true_gradient import agreement
from leapalign.evaluation.generate import generate
from leapalign.inputs.prompt_limits import warn_of_cut
from leapalign.inputs.validation import UserError
from leapalign.memory.peaks import peaks_since_last
from leapalign.memory.placement import lender, place, training_device
from leapalign.memory.residency import stage
from leapalign.memory.room import require_room
from leapalign.method_gradient import Objective, draw_several, joined, method_backward
from leapalign.methods import Method, get_method
from leapalign.models import load_model
from leapalign.models.block_cache import cached_blocks, require_cache
from leapalign.models.patching import patch_networks
from leapalign.models.protocol import FlowModel
from leapalign.models.velocity import prompted_velocity, require_fit, undetached
from leapalign.optimizers.host_speed import require_speed, warn_of_patch
from leapalign.optimizers.optimizer import Optimizer
from leapalign.parallel import processes
from leapalign.parallel.sharding import forget_gathered
from leapalign.prompts.embeddings import embeddings_of
from leapalign.prompts.files import read_prompts
from leapalign.prompts.order import PromptOrder
from leapalign.regularization import BaseVelocityPenalty, base_velocity_penalty
from leapalign.reward_gradient import RewardTerm
from leapalign.rewards import reward_terms
from leapalign.rollout import sample_rollout
from leapalign.storage.embedded import resolve
from leapalign.streams import INDEX_STREAM, NOISE_STREAM, seed_of

SAMPLE_SEED = 2_000_000
"""Of the first sample's noise, in every run."""
SKIPPED_AT_MOST = 10
"""Iterations in a row that may pass without a finite gradient."""


@dataclass
class Trainer:
    """Everything a run needs, and the loop over it.

    ``embeddings[i]`` belongs to ``prompts[i]``. ``iteration`` counts finished optimizer steps.
    """

    config: Config
    model: FlowModel
    prompts: list[str]
    embeddings: Any
    rewards: list[RewardTerm]
    method: Method
    optimizer: Optimizer
    penalty: BaseVelocityPenalty | None = None
    iteration: int = 0
    incidents: list[dict[str, Any]] = field(default_factory=list)
    """Of the last iteration: what was not finite, sample by sample, and then as a whole."""
    order: PromptOrder = field(init=False)

    def __post_init__(self) -> None:
        self.order = PromptOrder(len(self.prompts), self.config.seed)

    @classmethod
    def from_config(cls, config: Config) -> Trainer:
        """Ready to train. Raises UserError before any long work."""
        trainer = cls.unencoded(config)
        trainer.encode()
        return trainer

    @classmethod
    def unencoded(cls, config: Config) -> Trainer:
        """Reads and checks every file the config names. Raises UserError.

        ``embeddings`` are None: without a cache that is long work, for which more may have to be checked.
        """
        method = get_method(**config.method)
        require_speed(config.memory)
        warn_of_patch(config.kernels, training_device())
        prompts = read_prompts(Path(resolve(config.prompts.path)))
        rewards = reward_terms(config)
        model = load_model(config.model)
        require_steps(config, model, method)
        require_room(config, model.draw_noise, training_device())
        warn_of_cut([(f"reward {term.name}", term.reward) for term in rewards], lambda: prompts)
        return cls.assembled(config, model, prompts, None, rewards, method, training_device())

    def encode(self) -> None:
        """Has the prompts encoded, or read from the cache. Raises UserError where they do not fit the model."""
        self.embeddings = embeddings_of(self.config, self.prompts)
        require_fit(self.model, self.embeddings)

    @classmethod
    def assembled(
        cls,
        config: Config,
        model: FlowModel,
        prompts: list[str],
        embeddings: Any,
        rewards: list[RewardTerm],
        method: Method,
        device: torch.device,
    ) -> Trainer:
        """Puts the parts where ``config`` says, with the optimizer that it names.

        Raises UserError where they cannot be, or cannot be patched.
        """
        require_cache(model.transformer, config.rollout)
        patch_networks(model, config.kernels)
        weights = place(model, config.memory, device)
        rewards = [replace(term, lend=lender(term.reward, config.memory, device)) for term in rewards]
        # Now, while the weights are the base's: a resumed run's come from a checkpoint later.
        penalty = base_velocity_penalty(config, model, device)
        parameters = [p for p in model.transformer.parameters() if p.requires_grad]
        iterations, changed = config.train.iterations, partial(forget_gathered, model.transformer)
        optimizer = Optimizer(parameters, config.optimizer, config.ema, iterations, config.seed, weights, changed)
        return cls(config, model, prompts, embeddings, rewards, method, optimizer, penalty)

    def run(self) -> Iterator[dict[str, float]]:
        """Trains to the last iteration, and yields the metrics of each.

        Raises UserError where `SKIPPED_AT_MOST` in a row changed nothing.
        """
        in_a_row = 0
        while self.iteration < self.config.train.iterations:
            started = time.perf_counter()
            metrics = self.train_one()
            in_a_row = in_a_row + 1 if metrics["skipped"] else 0
            if self.iteration == 0:
                warn_of_thresholds(self.rewards, metrics)
            self.iteration += 1
            seconds = time.perf_counter() - started
            peaks = peaks_since_last(self.model.device)
            yield {"iteration": self.iteration, **metrics, **peaks, "seconds": seconds}
            if in_a_row == SKIPPED_AT_MOST:
                raise UserError(
                    f"{in_a_row} iterations in a row had no finite gradient, and changed nothing; look into "
                    "incidents.jsonl, lower optimizer.learning_rate, and resume from an earlier checkpoint"
                )

    def train_one(self) -> dict[str, float]:
        """One optimizer step over ``train.batch_size`` images; the mean of their metrics."""
        metrics = self.accumulate_gradients()
        metrics["learning_rate"] = self.optimizer.learning_rate
        with stage("optimizer"):
            metrics |= self.optimizer.step(hold=metrics["skipped_samples"] == self.config.train.batch_size)
        if not math.isfinite(metrics["grad_norm"]):
            blamed = self.optimizer.offending
            what = "norm of the gradient" if blamed is None else f"gradient of {self._trained[blamed]}"
            self.incidents.append(self._incident(what, self._positions, {}))
        return metrics

    def draw_samples(self) -> Tensor:
        """Images ``(count, 3, H, W)`` in [0, 1] by the weight average for the run's first prompts, the same seeds every
        time; as many as ``samples.count``, or prompts."""
        config = self.config
        count = min(config.samples.count, len(self.prompts))
        with stage("sampling"), self.optimizer.averaged_weights():
            return generate(
                self.model,
                self.embeddings[torch.arange(count)],
                range(SAMPLE_SEED, SAMPLE_SEED + count),
                config.rollout.num_steps,
                processes.share(config.rollout.batch_size),
                "samples",
                config.rollout.sigmas,
            )

    def refuse_bad_weights(self) -> None:
        """Raises UserError where a weight is not finite: what is saved then would be of no use."""
        bad = self.optimizer.bad_weight()
        if bad is not None:
            raise UserError(
                f"after iteration {self.iteration} {self._trained[bad]} is not finite; lower optimizer.learning_rate, "
                f"and resume {self.config.output}, whose checkpoints stay as they were"
            )

    @property
    def _trained(self) -> list[str]:
        """Names of the parameters that are trained, as the optimizer numbers them."""
        return [name for name, parameter in self.model.transformer.named_parameters() if parameter.requires_grad]

    @property
    def _positions(self) -> range:
        """Of this iteration's images in the run."""
        total = self.config.train.batch_size
        return range(self.iteration * total, (self.iteration + 1) * total)

    def accumulate_gradients(self) -> dict[str, float]:
        """The gradient of this iteration's mean loss, rollout by rollout; the mean of the images' metrics."""
        config = self.config
        total = config.train.batch_size
        size = min(config.rollout.batch_size, total)
        first = self._positions.start
        generator = torch.Generator().manual_seed(seed_of(config.seed, INDEX_STREAM, first))
        # For all images at once, so that how many share a rollout changes nothing.
        draws = draw_several(self.method, config.train.leaps_per_rollout, config.rollout.num_steps, total, generator)
        parts, self.incidents, skipped = [], [], 0
        own = processes.share(size)
        for start in range(processes.rank() * own, total, size):
            indices = joined(draws, slice(start, start + own))
            positions = range(first + start, first + start + own)
            part = self._accumulate(positions, indices, share=size / total)
            faults = part.pop("fault")
            if float((faults == 0).float().mean()) < 1:
                skipped += self._note_faults(faults.tolist(), positions, indices)
            parts.append(part)
        # The first part may have measured more than the others.
        columns = {name: torch.cat([part[name] for part in parts if name in part]) for name in parts[0]}
        self.incidents = [incident for of_one in processes.gathered(self.incidents) for incident in of_one]
        return {
            **{name: float(column.nanmean()) for name, column in processes.rows_of_all(columns).items()},
            "skipped_samples": float(sum(processes.gathered(skipped))),
        }

    def _note_faults(self, faults: list[int], positions: range, indices: dict[str, Tensor]) -> int:
        """Writes down what was not finite in the columns of a rollout; returns of how many of its samples."""
        names = fault_names([term.name for term in self.rewards])
        found: dict[int, tuple[str, dict[str, Any]]] = {}
        for column, fault in enumerate(faults):
            if fault:
                drawn = {name: index[..., column].tolist() for name, index in indices.items()}
                found.setdefault(positions[column % len(positions)], (names[fault], drawn))
        for position, (what, drawn) in found.items():
            self.incidents.append(self._incident(what, range(position, position + 1), drawn))
        return len(found)

    def _incident(self, what: str, positions: range, indices: dict[str, Any]) -> dict[str, Any]:
        return {
            "iteration": self.iteration + 1,
            "first_not_finite": what,
            "prompts": [self.prompts[self.order[position]] for position in positions],
            "noise_seeds": [seed_of(self.config.seed, NOISE_STREAM, position) for position in positions],
            "indices": indices,
        }

    def _accumulate(self, positions: range, indices: dict[str, Tensor], share: float) -> dict[str, Tensor]:
        """Adds this process's part of the gradient of ``share`` times the mean loss over a rollout's images, of which
        it has those at ``positions`` of the run."""
        config = self.config
        chosen = [self.order[position] for position in positions]
        prompts = [self.prompts[index] for index in chosen]
        velocity = prompted_velocity(self.model, self.embeddings[torch.tensor(chosen)])
        noise = self.model.draw_noise([seed_of(config.seed, NOISE_STREAM, position) for position in positions])
        with stage("rollout"), cached_blocks(self.model.transformer, config.rollout):
            sigmas = self.model.sigmas(config.rollout.num_steps, config.rollout.sigmas)
            rollout = sample_rollout(velocity, noise, sigmas)
        if config.rollout.cache is not None:
            rollout = CachedRollout.of(rollout, velocity)
        objective = Objective.of(config, self.model.decode, self.rewards)
        microbatch = config.train.microbatch
        metrics = method_backward(
            self.method,
            indices,
            rollout,
            velocity,
            objective,
            prompts,
            share=share / config.model.gradient_divisor,
            among=processes.count(),
            microbatch=microbatch,
            gradient_sink=self.optimizer.gradient_sink,
            penalty=self.penalty,
        )
        errors = rollout.errors() if isinstance(rollout, CachedRollout) else None
        if errors is not None:
            metrics["velocity_error"] = errors
        every = config.diagnostics.true_gradient_every
        if every and self.iteration % every == 0 and positions.start == self._positions.start:
            parameters = [p for p in self.model.transformer.parameters() if p.requires_grad]
            x0_gradient = share * objective.true_gradient(rollout, prompts)
            metrics |= agreement(parameters, rollout, undetached(velocity), x0_gradient, microbatch)
        return metrics


def require_steps(config: Config, model: FlowModel, method: Method) -> None:
    """Raises UserError where ``method`` cannot draw from, or plan for, the rollout's steps."""
    steps = config.rollout.num_steps
    try:
        method.plan(model.sigmas(steps, config.rollout.sigmas), **method.draw(steps, 1, torch.Generator()))
    except ValueError as error:
        raise UserError(f"method: {error}; change it or rollout.num_steps") from None
