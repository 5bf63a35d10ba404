"""`kernels.patch`: a run computes with the ops of leap_kernels, and otherwise does what it did."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from family_checks import write_config
from leap_kernels import patch
from measured_iterations import measured
from tiny_folders import save_flux

from leapalign.config import Config, KernelsConfig, load_config
from leapalign.evaluation.generate import sampling_model
from leapalign.inputs.validation import UserError
from leapalign.models.patching import patch_networks
from leapalign.planning.simulate import ITERATION, simulate
from leapalign.trainer import Trainer


def config_of(folder: Path, on: bool, **sections: object) -> Config:
    model = {"path": str(folder / "model")}
    if not (folder / "model").exists():
        save_flux(folder / "model")
    return load_config(write_config(folder, model, kernels={"patch": on}, **sections))


def test_the_gradient_of_an_iteration_is_what_it_was(tmp_path: Path) -> None:
    config, gradients = config_of(tmp_path, False), []
    for on in (False, True):
        trainer = Trainer.from_config(replace(config, kernels=KernelsConfig(patch=on)))
        trainer.accumulate_gradients()
        grads = [p.grad.flatten() for p in trainer.model.transformer.parameters() if p.grad is not None]
        gradients.append(torch.cat(grads).double())
    difference = (gradients[1] - gradients[0]).norm() / gradients[0].norm()
    assert 0 < difference < 1e-4


def test_images_are_drawn_with_it(tmp_path: Path) -> None:
    model = sampling_model(config_of(tmp_path, True), None)
    assert not patch(model.transformer).replaced
    assert not patch(model.decoder).replaced


@pytest.mark.slow
def test_a_simulation_needs_what_an_iteration_does(tmp_path: Path) -> None:
    config = config_of(tmp_path, True, train={"iterations": 1, "batch_size": 4})
    real, found = measured(config), simulate(config)
    for stage in ITERATION:
        assert found.device[stage].total == pytest.approx(real.device.peaks[stage].total, rel=0.005)


def test_an_unknown_transformer_is_refused(tmp_path: Path) -> None:
    model = sampling_model(config_of(tmp_path, False), None)
    for module in model.transformer.modules():
        module.__class__ = type("Other", (type(module),), {})
    patch_networks(model, KernelsConfig(patch=False))
    with pytest.raises(UserError, match=r"knows no block of Other as it is here \(no class is known\); install"):
        patch_networks(model, KernelsConfig(patch=True))
