"""A reward of the user's own: any Python callable. Naming it is the only way to have a config run code."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from leapalign.inputs.paths import PathText
from leapalign.inputs.validation import UserError, brief
from leapalign.reward_gradient import RewardFn
from leapalign.rewards.kept_settings import settings_kept
from leapalign.rewards.own_reward import OwnReward, place


@dataclass(frozen=True)
class Custom:
    """A function of your own, ``(images (B, 3, H, W) in [0, 1], prompts) -> (B,)``.

    It must be differentiable in the images, sample by sample. A ``torch.nn.Module`` is moved to the device; an
    attribute ``highest`` says what no score exceeds.
    """

    function: PathText
    """``package.module:name``, or ``path/to/file.py:name``."""

    def load(self) -> RewardFn:
        """The callable, as an `OwnReward`. Raises UserError where it cannot be imported, or cannot be called so."""
        module, separator, name = self.function.rpartition(":")
        if not (module and separator and name):
            raise UserError(
                f"reward.function '{self.function}' must read package.module:function, or path/to/file.py:function"
            )
        title = f"reward.function '{self.function}'"
        try:
            with settings_kept(title, set()):
                found = getattr(_from_file(module) if module.endswith(".py") else importlib.import_module(module), name)
        except SystemExit as error:
            raise UserError(f"{title} ends the program as it is imported ({place(error)}); take that out") from None
        except Exception as error:  # whatever the user's module raises
            raise UserError(
                f"cannot import reward.function '{self.function}' ({type(error).__name__}: {brief(error)}); correct "
                "it, or put its folder on PYTHONPATH"
            ) from None
        if not callable(found):
            raise UserError(f"{title} is a {type(found).__name__}; name a function of (images, prompts)")
        try:
            inspect.signature(found).bind("images", "prompts")
        except TypeError as error:
            raise UserError(
                f"{title} cannot be called with images and prompts ({brief(error)}); give it these two arguments"
            ) from None
        except ValueError:  # some built-in functions do not say what they take
            pass
        return OwnReward(found, title)


def _from_file(file: str) -> ModuleType:
    """The module in ``file``, under a name of its own, by which its dataclasses find it."""
    name = f"leapalign_custom_{Path(file).stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None  # as there is for every .py
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
