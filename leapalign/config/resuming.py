"""What may change when a run is resumed, key by key."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from leapalign.config.sections import Config
from leapalign.inputs.validation import UserError, shortened

MAY_CHANGE = ""
UNLESS_WATCHED = "the watch compares with what it measured before"
"""Decided where a watched run is resumed; without a watch it may change."""
_NOISE = "every image's noise, prompt and leaps follow from it"
_SIZE = "noise, samples and their comparison are of one size"
_ADAPTER = "checkpoints hold the adapters of these layers, rank and alpha"
PROMPTS_DIGEST = "prompts.sha256"
"""Stands beside the keys: of the prompts themselves, in their order, wherever their file lies."""

RESUMED: dict[str, str] = {
    "output": "it goes on in its own folder",
    "seed": _NOISE,
    "threshold": MAY_CHANGE,
    "model.path": "checkpoints hold the weights of this model",
    "model.dtype": "weights and moments are saved in it",
    "model.guidance": UNLESS_WATCHED,
    "model.max_sequence_length": UNLESS_WATCHED,
    "model.true_cfg_scale": UNLESS_WATCHED,
    "model.negative_prompt": UNLESS_WATCHED,
    "model.true_cfg_batched": MAY_CHANGE,
    "model.cfg_gradient": MAY_CHANGE,
    "model.cfg_gradient_compensated": MAY_CHANGE,
    "model.compile": MAY_CHANGE,
    "model.lora_rank": _ADAPTER,
    "model.lora_alpha": _ADAPTER,
    "model.lora_path": _ADAPTER,
    "model.lora_targets": _ADAPTER,
    "model.quantization": "adapters were trained beside weights that are rounded so",
    "model.height": _SIZE,
    "model.width": _SIZE,
    "prompts.path": MAY_CHANGE,
    PROMPTS_DIGEST: "each image's prompt follows from their number and order",
    "prompts.cache": MAY_CHANGE,
    "rollout.num_steps": UNLESS_WATCHED,
    "rollout.sigmas": UNLESS_WATCHED,
    "rollout.batch_size": MAY_CHANGE,
    "rollout.cache": MAY_CHANGE,
    "method": MAY_CHANGE,
    "reward": UNLESS_WATCHED,
    "equal_reward_gradients": MAY_CHANGE,
    "optimizer.name": "checkpoints hold its moments",
    "optimizer.learning_rate": MAY_CHANGE,
    "optimizer.beta1": MAY_CHANGE,
    "optimizer.beta2": MAY_CHANGE,
    "optimizer.weight_decay": MAY_CHANGE,
    "optimizer.max_grad_norm": MAY_CHANGE,
    "optimizer.schedule": MAY_CHANGE,
    "optimizer.warmup_iterations": MAY_CHANGE,
    "ema.dtype": "the average is saved in it",
    "ema.decay": MAY_CHANGE,
    "ema.warmup": MAY_CHANGE,
    "ema.start": MAY_CHANGE,
    "ema.interval": MAY_CHANGE,
    "train.iterations": MAY_CHANGE,
    "train.batch_size": "images are counted in batches, and noise that was used would be used again",
    "train.microbatch": MAY_CHANGE,
    "train.leaps_per_rollout": MAY_CHANGE,
    "train.reward_chunk": MAY_CHANGE,
    "train.image_clamp": MAY_CHANGE,
    "memory.optimizer": MAY_CHANGE,
    "memory.weights": MAY_CHANGE,
    "memory.shard": MAY_CHANGE,
    "memory.stream_buffers": MAY_CHANGE,
    "memory.checkpointing": MAY_CHANGE,
    "memory.checkpoint_every": MAY_CHANGE,
    "memory.checkpoint_decoder": MAY_CHANGE,
    "memory.rewards": MAY_CHANGE,
    "memory.attention": MAY_CHANGE,
    "kernels.patch": "its ops round otherwise, and the run would not be the one that began",
    "diagnostics.true_gradient_every": MAY_CHANGE,
    "checkpoint.every": MAY_CHANGE,
    "checkpoint.keep": MAY_CHANGE,
    "samples.every": MAY_CHANGE,
    "samples.count": MAY_CHANGE,
    "regularization.base_velocity": MAY_CHANGE,
    "evaluate.rewards": MAY_CHANGE,
    "evaluate.num_steps": MAY_CHANGE,
    "evaluate.guidance": MAY_CHANGE,
    "watch.every": MAY_CHANGE,
    "watch.prompts": UNLESS_WATCHED,
    "watch.seeds": UNLESS_WATCHED,
    "watch.rewards": UNLESS_WATCHED,
    "watch.stop_when": MAY_CHANGE,
}
"""Every key, with the reason why it may not change; what may is used from the next iteration on."""


def settings_of(config: Config) -> dict[str, Any]:
    """The values of ``config`` by dotted key, as JSON has them."""
    flat: dict[str, Any] = {}
    for key, value in dataclasses.asdict(config).items():
        if dataclasses.is_dataclass(getattr(config, key)):
            flat |= {f"{key}.{name}": one for name, one in value.items()}
        else:
            flat[key] = value
    return dict(json.loads(json.dumps(flat, default=str)))


def refuse_changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Raises UserError for the first key that has another value ``after`` than ``before`` and may not change.

    A key that either lacks has not changed.
    """
    for key, value in after.items():
        reason = RESUMED[key]
        if reason not in (MAY_CHANGE, UNLESS_WATCHED) and before.get(key, value) != value:
            what = (
                "the prompts in prompts.path, which are others now"
                if key == PROMPTS_DIGEST
                else f"{key} from {_shown(before[key])} to {_shown(value)}"
            )
            raise UserError(
                f"a run that goes on cannot change {what}: {reason}; set it back, or begin a new run with another "
                "output"
            )


def _shown(value: Any) -> str:
    return shortened(json.dumps(value))
