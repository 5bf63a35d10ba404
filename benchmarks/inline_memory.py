"""Activations of FLUX.1-dev in a staged iteration and in an in-line one, simulated in the same settings.

    python benchmarks/inline_memory.py configs/flux1_dev/80gb.yaml memory.checkpoint_decoder=true

The in-line iteration holds both leaps, the decoder and the reward in one graph, as a trainer that calls
``loss.backward()`` does, for as many images at once as the staged one gives a micro-batch. Both recompute the same
blocks. Activations are what was alive at a stage's peak besides weights, gradients, moments and latents.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from typing import Any

import torch
from leap_kernels import consistency_weighted_loss, leap_update, scale_gradient

from leapalign.config import load_config
from leapalign.inputs.paths import path_argument
from leapalign.memory.residency import made_for, stage
from leapalign.models.velocity import prompted_velocity
from leapalign.planning.simulate import Simulation, simulate
from leapalign.reward_gradient import to_unit_range
from leapalign.rollout import sample_rollout
from leapalign.trainer import Trainer


def inline_iteration(trainer: Trainer) -> None:
    """Rollout after rollout, the whole loss of each in one graph."""
    config = trainer.config
    size = config.rollout.batch_size
    sigmas = trainer.model.sigmas(config.rollout.num_steps, config.rollout.sigmas)
    for start in range(0, config.train.batch_size, size):
        samples = torch.arange(start, start + size)
        velocity = prompted_velocity(trainer.model, trainer.embeddings[samples])
        with stage("rollout"):
            rollout = sample_rollout(velocity, trainer.model.draw_noise(samples.tolist()), sigmas)
        drawn = trainer.method.draw(rollout.num_steps, size, torch.Generator().manual_seed(start))
        with stage("surrogate"):
            k, j, columns = drawn["k"], drawn["j"], torch.arange(size)
            x_k, target = rollout.latents[k, columns], rollout.latents[j, columns]
            x_j, d_j = leap_update(x_k, velocity(x_k, sigmas[k]), sigmas[k], sigmas[j], target=target)
            v_j = velocity(scale_gradient(x_j, 0.3), sigmas[j])
            x_end, d_end = leap_update(x_j, v_j, sigmas[j], torch.zeros(size), target=rollout.latents[-1])
            with made_for("reward"):
                scores = trainer.rewards[0].reward(to_unit_range(trainer.model.decode(x_end)), ["a prompt"] * size)
            loss, _ = consistency_weighted_loss(scores, (d_j, d_end), config.threshold, 0.1)
            loss.backward()
        del x_k, target, x_j, v_j, x_end, scores, loss, d_j, d_end
    with stage("optimizer"):
        trainer.optimizer.step()


def activations(found: Simulation, frozen: int) -> dict[str, int]:
    """Bytes of activations at each stage's peak; ``frozen``: the decoder's and the reward's weights."""
    return {
        name: peak.by_role.get("activations", 0) + peak.by_role.get("reward", 0) - frozen
        for name, peak in found.device.items()
        if name in ("reward", "surrogate")
    }


def measure(config: Any) -> dict[str, Any]:
    size = config.train.microbatch
    staged = simulate(config)
    inline = simulate(replace(config, rollout=replace(config.rollout, batch_size=size)), inline_iteration)
    # At its peak the optimizer finds nothing of the reward but weights.
    frozen = staged.device["optimizer"].by_role["reward"]
    found = {name: activations(one, frozen) for name, one in (("staged", staged), ("inline", inline))}
    return {
        "microbatch": size,
        "staged_bytes": found["staged"],
        "inline_bytes": found["inline"],
        "ratio": max(found["staged"].values()) / max(found["inline"].values()),
        "staged_device_peak_bytes": staged.device_peak,
        "inline_device_peak_bytes": inline.device_peak,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=path_argument)
    arguments, overrides = parser.parse_known_args()
    print(json.dumps({"profile": arguments.config.stem} | measure(load_config(arguments.config, overrides))))
