"""Has models of diffusers compute with these ops, without changing their parameters, names or classes.

A module is known by the name of its class and by a digest of the source of what is replaced. One whose source is
another, as in an unknown version of diffusers, stays as it is, and `Patch.left` says why.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn

from . import _patch_autoencoder, _patch_flux, _patch_flux2, _patch_qwen_image, _patch_sd3, _patch_z_image
from ._patch_rules import Forward, Rule, digest_of

_RULES: dict[str, list[Rule]] = {}
for _family in (_patch_autoencoder, _patch_flux, _patch_flux2, _patch_qwen_image, _patch_sd3, _patch_z_image):
    for _rule in _family.RULES:
        _RULES.setdefault(_rule.name, []).append(_rule)


@dataclass(frozen=True)
class Patch:
    """What `patch` did to a model."""

    replaced: dict[str, tuple[str, ...]]
    """Names of modules, with the ops that they compute with now."""
    left: dict[str, str]
    """Names of modules of known classes that stay as they were, with the reason."""
    _placed: list[tuple[str, nn.Module, Forward]] = field(default_factory=list, repr=False)

    def undo(self) -> None:
        """Give all modules back the `forward` of their class.

        Raises:
            RuntimeError: if another one was put in its place meanwhile; nothing is changed then.
        """
        for name, module, forward in self._placed:
            if module.__dict__.get("forward") is not forward:
                raise RuntimeError(f"The forward of {name or 'the model'} was replaced after patch: undo that first.")
        for _, module, _ in self._placed:
            del module.forward
        self._placed.clear()


def patch(model: nn.Module) -> Patch:
    """Have the modules of `model` that are known compute with the ops of this package, and return what was done.

    Known are the transformers of FLUX.1, FLUX.2, Stable Diffusion 3.5, Qwen-Image and Z-Image, and the autoencoder of
    images, as they are in diffusers. Only a module's `forward` is replaced, on the instance: parameters, names, classes
    and `state_dict` are what they were, and a linear layer is called as a module, whatever was put in its place, such
    as an adapter. Norms are not called; where one has hooks, or arguments do not fit an op, the module computes as
    before. Results differ by rounding: an op rounds once where PyTorch rounds after every operation.

    Modules are patched once; a second `patch` leaves them as they are and says so.

    Raises:
        TypeError: if `model` is no module: of a pipeline, its transformer and its autoencoder are.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"patch takes a module, such as pipeline.transformer or pipeline.vae, not {type(model).__name__}."
        )
    done = Patch({}, {})
    for name, module in model.named_modules():
        for rule in _rules_of(module):
            reason = _reason(module, rule)
            if reason is None:
                forward = Forward(functools.partial(rule.forward, *rule.bound(module)), module)
                module.forward = forward
                done.replaced[name] = rule.ops
                done._placed.append((name, module, forward))
                done.left.pop(name, None)
                break
            done.left[name] = reason
    return done


def _rules_of(module: nn.Module) -> Iterator[Rule]:
    return (rule for rule in _RULES.get(type(module).__name__, ()) if rule.applies(module))


def _reason(module: nn.Module, rule: Rule) -> str | None:
    """Say why a module cannot be patched by a rule, or return None if it can."""
    present = module.__dict__.get("forward")
    if isinstance(present, Forward):
        return "it is patched already"
    if present is not None:
        return "another forward was put in place of its class's"
    digest = digest_of(rule.sources(module))
    if digest is None:
        return "its source cannot be read"
    if digest != rule.digest:
        return (
            rule.lacks(module) or f"its source is unknown (digest {digest}): another version of diffusers, or changed"
        )
    return rule.unsuitable(module)
