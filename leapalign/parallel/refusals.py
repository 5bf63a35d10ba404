"""What a run on several processes cannot do yet: refused by name, before any long work."""

from __future__ import annotations

from leapalign.config import Config
from leapalign.inputs.validation import UserError

OPTIMIZERS = ("adamw", "adamw_8bit")
"""Those that move a part of a weight as they would the whole."""


def refuse_unsupported(config: Config, processes: int) -> None:
    """Raises UserError for the first setting of ``config`` that more than one of ``processes`` cannot have."""
    if processes == 1:
        return
    images = min(config.rollout.batch_size, config.train.batch_size)
    if images % processes:
        raise UserError(
            f"the {images} images of a rollout cannot be divided among {processes} processes evenly; set "
            f"rollout.batch_size to a multiple of {processes}"
        )
    for key, has, remedy in (
        ("memory.weights streamed", config.memory.weights == "streamed", "set it to resident"),
        ("memory.optimizer host", config.memory.optimizer == "host", "set it to device"),
        (
            f"optimizer.name {config.optimizer.name}",
            config.optimizer.name not in OPTIMIZERS,
            f"set it to {' or '.join(OPTIMIZERS)}",
        ),
        ("model.quantization", config.model.quantization is not None, "set it to null"),
        ("model.compile", config.model.compile, "set it to false"),
        ("rollout.cache", config.rollout.cache is not None, "set it to null"),
        ("regularization.base_velocity", config.regularization.base_velocity > 0, "set it to 0"),
        ("diagnostics.true_gradient_every", config.diagnostics.true_gradient_every > 0, "set it to 0"),
    ):
        if has:
            raise UserError(f"{key} works with one process only; {remedy}, or train with one")
