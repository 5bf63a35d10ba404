"""A reward of the user's own that does not keep its contract: one sentence, the same in ``train`` and ``evaluate``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command_line import refused
from reward_cases import smooth_images
from small_runs import config_of

from leapalign.cli import main
from leapalign.config import save_config
from leapalign.inputs.validation import UserError
from leapalign.rewards import get_reward

MODULE = """
import sys

import torch


def good(images, prompts):
    return images.mean(dim=(1, 2, 3))


def nothing(images, prompts):
    good(images, prompts)


def listed(images, prompts):
    return good(images, prompts).tolist()


def array(images, prompts):
    return good(images, prompts).detach().numpy()


def complex_numbers(images, prompts):
    return good(images, prompts) + 0j


def scalar(images, prompts):
    return good(images, prompts).mean()


def column(images, prompts):
    return good(images, prompts)[:, None]


def leaving(images, prompts):
    sys.exit(0)


def in_place(images, prompts):
    return good(images.sub_(0.5), prompts)


def detached(images, prompts):
    return good(images.detach(), prompts)


def of_numpy(images, prompts):
    return torch.tensor(images.numpy().mean(axis=(1, 2, 3)))


weight = torch.ones((), requires_grad=True)


def of_weights_alone(images, prompts):
    return good(images.detach(), prompts) * weight


def in_double(images, prompts):
    torch.set_default_dtype(torch.float64)
    return good(images, prompts)


def in_threads(images, prompts):
    torch.set_num_threads(3)
    return good(images, prompts)


def popping(images, prompts):
    prompts.clear()
    return good(images, prompts)
"""
RETURNS = {
    "nothing": "None",
    "listed": "an object of type list",
    "array": "an object of type ndarray",
    "complex_numbers": "a tensor of complex64 and shape (2,)",
    "scalar": "a tensor of float32 and shape ()",
    "column": "a tensor of float32 and shape (2, 1)",
}
Command = Callable[[str], list[str]]


@pytest.fixture
def own(tmp_path: Path) -> Path:
    file = tmp_path / "own_reward_for_a_test.py"
    file.write_text(MODULE)
    return file


@pytest.fixture(params=["train", "evaluate"])
def command(request: pytest.FixtureRequest, parts: Path, own: Path, tmp_path: Path) -> Command:
    """The command line that scores two images by a function of `MODULE`."""

    def arguments(function: str) -> list[str]:
        asked = ("rollout.batch_size=2", "train.batch_size=2", "train.iterations=1", "rollout.num_steps=2")
        reward = f"reward={{name: custom, function: '{own}:{function}'}}"
        config = config_of(parts, tmp_path / "run", *asked, "samples.count=1", "watch.every=0", reward)
        save_config(config, tmp_path / "config.yaml")
        return [request.param, "--config", str(tmp_path / "config.yaml")]

    return arguments


@pytest.mark.parametrize("function", RETURNS)
def test_what_is_no_score_a_sample_is_told(command: Command, function: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(command(function), capsys)
    assert f":{function}' must return one score a sample, a tensor of real numbers of shape (2,), and returned" in said
    assert f"returned {RETURNS[function]}; correct its return" in said


def test_one_that_leaves_ends_the_run_with_an_error(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(command("leaving"), capsys)
    assert ":leaving' ends the program instead of giving a score (own_reward_for_a_test.py, line " in said


def test_images_that_are_changed_in_place_are_told(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert ":in_place' changes its images in place, and other rewards" in refused(command("in_place"), capsys)


@pytest.mark.parametrize("function", ["detached", "of_numpy", "of_weights_alone"])
def test_scores_without_a_gradient_are_told(
    command: Command, function: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Training refuses them; they can be evaluated, and that says once that they cannot be trained on."""
    asked = command(function)
    if asked[0] == "train":
        # numpy itself refuses a tensor that has a gradient.
        message = "raised RuntimeError: Can't call numpy()" if function == "of_numpy" else "without a gradient to the"
        assert message in refused(asked, capsys)
        return
    assert main(asked) == 0
    (told,) = (message for message in caplog.messages if "reward.function" in message)
    assert told.endswith(
        f":{function}' gives scores without a gradient to the images: it can be evaluated and watched, not trained on"
    )


@pytest.mark.parametrize(
    ("function", "told"),
    [
        ("in_double", "sets the default dtype to torch.float64 for the whole process: it is set back to torch.float32"),
        ("in_threads", "sets the number of threads to 3 for the whole process: it is set back to 1 each time"),
    ],
)
def test_settings_of_the_process_are_set_back_and_told_of_once(
    command: Command, function: str, told: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert main([*command(function), "rollout.batch_size=1", "train.reward_chunk=1"]) == 0
    assert [message for message in caplog.messages if "reward.function" in message] == [
        message for message in caplog.messages if told in message
    ]
    assert sum(told in message for message in caplog.messages) == 1
    assert torch.get_default_dtype() == torch.float32
    assert torch.get_num_threads() == 1


def test_a_good_one_has_nothing_told_of_it(
    command: Command, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert main(command("good")) == 0
    assert not [message for message in caplog.messages if "reward.function" in message]


def test_its_prompts_are_a_copy(own: Path) -> None:
    prompts = ["a circle", "a cross", "a square"]
    get_reward("custom", function=f"{own}:popping")(smooth_images(8, 8), prompts)
    assert len(prompts) == 3


@pytest.mark.parametrize("line", ["sys.exit(1)", "raise SystemExit", "exit()"])
def test_a_module_that_leaves_as_it_is_imported_is_told(own: Path, line: str) -> None:
    own.write_text(f"{MODULE}\n{line}\n")
    with pytest.raises(UserError, match=r":good' ends the program as it is imported \(.*, line \d+\); take that out"):
        get_reward("custom", function=f"{own}:good")


def test_settings_are_kept_from_an_import_too(own: Path, caplog: pytest.LogCaptureFixture) -> None:
    own.write_text(f"{MODULE}\ntorch.set_default_dtype(torch.float64)\n")
    get_reward("custom", function=f"{own}:good")
    assert torch.get_default_dtype() == torch.float32
    (message,) = caplog.messages
    assert "sets the default dtype to torch.float64" in message
