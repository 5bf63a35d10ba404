"""A user's function as a reward: whatever it does to the run beside giving scores is kept from it, or told."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from leapalign.inputs.validation import UserError, brief
from leapalign.reward_gradient import RewardFn, require_scores
from leapalign.rewards.kept_settings import settings_kept

_log = logging.getLogger("leapalign")


class OwnReward(nn.Module):
    """Calls ``function``, and returns its scores.

    Raises UserError, after which training can go on, where it raises anything, ends the program, changes images in
    place, or returns no scores. Settings of PyTorch that it changes are set back and told of, and so is a score without
    a gradient where none was asked for.
    """

    def __init__(self, function: RewardFn, title: str) -> None:
        """title: what errors call it."""
        super().__init__()
        self.function, self.title = function, title
        self.told: set[str] = set()
        self.called = False
        if hasattr(function, "highest"):
            self.highest = float(function.highest)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        scores = self._scores(images, prompts)
        first, self.called = not self.called, True
        if first and not torch.is_grad_enabled() and not self._reaches(images[:1], prompts[:1]):
            _log.warning(
                "%s gives scores without a gradient to the images: it can be evaluated and watched, not trained on",
                self.title,
            )
        return scores

    def _scores(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        version = _version(images)
        try:
            with settings_kept(self.title, self.told):
                scores = self.function(images, list(prompts))
        except (UserError, torch.OutOfMemoryError):
            raise
        except SystemExit as error:
            raise UserError(
                f"{self.title} ends the program instead of giving a score ({place(error)}); take that out, then go on "
                "with --resume"
            ) from None
        except Exception as error:  # whatever the user's function raises
            raise UserError(
                f"{self.title} raised {type(error).__name__}: {brief(error)} ({place(error)}); correct it, then go on "
                "with --resume"
            ) from error
        if _version(images) != version:
            raise UserError(
                f"{self.title} changes its images in place, and other rewards and saved pictures with them; have it "
                "begin with images = images.clone()"
            )
        return require_scores(scores, len(images), self.title)

    def _reaches(self, image: Tensor, prompts: Sequence[str]) -> bool:
        """Whether the score of ``image (1, 3, H, W)`` has a gradient there."""
        with torch.enable_grad():
            leaf = image.detach().clone().requires_grad_()
            try:
                score = self._scores(leaf.view_as(leaf), prompts).sum()
                return score.requires_grad and torch.autograd.grad(score, leaf, allow_unused=True)[0] is not None
            except UserError:  # of a function that leaves PyTorch: numpy takes no tensor that has a gradient
                return False
            except torch.OutOfMemoryError:  # nobody asked for a gradient
                return True


def _version(images: Tensor) -> int:
    """How often ``images`` were changed in place; 0 where PyTorch does not count."""
    return 0 if images.is_inference() else images._version


def place(error: BaseException) -> str:
    """File and line in which ``error`` was raised."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(last.filename).name}, line {last.lineno}"
