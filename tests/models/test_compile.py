"""Compiled blocks compute the same, gradients included."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch._inductor.config
from command_line import refused
from diffusers import FluxTransformer2DModel
from small_runs import config_of, gradient

from leapalign.config import save_config
from leapalign.inputs.validation import UserError
from leapalign.models import compile_blocks


@pytest.mark.slow
def test_gradients_are_those_of_eager_blocks(parts: Path, tmp_path: Path) -> None:
    """Recomputed ones, too."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    asked = "memory.checkpointing=blocks"
    eager, compiled = (gradient(config_of(parts, tmp_path, asked, f"model.compile={on}")) for on in (False, True))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-6)


def test_without_a_compiler_nothing_begins(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Found by PyTorch itself, where its settings name a compiler that is not there."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (None, str(tmp_path / "g++")))
    save_config(config_of(parts, tmp_path / "run", "model.compile=true"), tmp_path / "config.yaml")
    line = refused(["train", "--config", str(tmp_path / "config.yaml")], capsys)
    assert "model.compile needs a C++ compiler, and PyTorch cannot compile here (" in line
    assert line.endswith("g++')); install what is missing, or set model.compile to false")
    assert not (tmp_path / "run").exists()


def test_models_without_repeated_blocks_and_streamed_ones_are_refused(parts: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Linear does not say which blocks repeat; set model.compile"):
        compile_blocks(torch.nn.Linear(2, 2))
    assert FluxTransformer2DModel._repeated_blocks
    streamed = ("memory.weights=streamed", "memory.optimizer=host", "memory.checkpointing=blocks")
    with pytest.raises(UserError, match="compiled blocks cannot be streamed"):
        config_of(parts, tmp_path, "optimizer.name=adamw_8bit", "model.compile=true", *streamed)
