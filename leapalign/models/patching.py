"""Has a model compute with the ops of `leap_kernels`, where the configuration says so."""

from __future__ import annotations

import logging

from leap_kernels import patch
from torch import nn

from leapalign.config import KernelsConfig
from leapalign.inputs.validation import UserError
from leapalign.models.protocol import FlowModel

_log = logging.getLogger("leapalign")


def patch_networks(model: FlowModel, config: KernelsConfig) -> None:
    """Patches the transformer and the decoder of ``model``, if ``config`` says so.

    Raises UserError where nothing is known of the transformer, as in another version of diffusers.
    """
    if config.patch:
        _require_known(model.transformer)
        if model.decoder is not None:
            _patched(model.decoder)


def _require_known(transformer: nn.Module) -> None:
    reasons = _patched(transformer)
    if reasons is not None:
        raise UserError(
            f"kernels.patch knows no block of {type(transformer).__name__} as it is here ({reasons}); install the "
            "diffusers of constraints.txt, or set kernels.patch to false"
        )


def _patched(network: nn.Module) -> str | None:
    """Patches a network; returns the reason where nothing of it could be."""
    done = patch(network)
    for reason in sorted(set(done.left.values())):
        _log.info("of %s some modules are not patched: %s", type(network).__name__, reason)
    if done.replaced or "it is patched already" in done.left.values():
        return None
    return next(iter(done.left.values()), "no class is known")
