"""Files and prompts that HPSv3 takes, and those that it refuses in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hpsv3_model import PROMPTS, Official, load, smooth_images
from safetensors.torch import load_file, save_file

from leapalign.inputs.validation import UserError


def test_names_of_newer_transformers_will_do(hpsv3_folder: Path, official_hpsv3: Official, tmp_path: Path) -> None:
    newer = official_hpsv3.model.state_dict() | {
        f"rm_head.{k}": v for k, v in official_hpsv3.rm_head.state_dict().items()
    }
    save_file({name: value.contiguous() for name, value in newer.items()}, tmp_path / "HPSv3.safetensors")
    images = smooth_images(64, 64)
    scores = load(hpsv3_folder, path=str(tmp_path), base=str(hpsv3_folder))(images, PROMPTS)
    torch.testing.assert_close(scores, load(hpsv3_folder)(images, PROMPTS))


@pytest.mark.parametrize(
    ("dropped", "added", "message"),
    [
        ("rm_head.5.bias", {}, "missing: rm_head.5.bias"),
        ("model.layers.2.mlp.down_proj.weight", {}, "missing: model.layers.2.mlp.down_proj.weight"),
        ("visual.merger.ln_q.weight", {}, "missing: visual.merger.ln_q.weight"),
        ("", {"model.layers.3.mlp.down_proj.weight": (1,)}, "unexpected: model.layers.3.mlp.down_proj.weight"),
        ("", {"model.embed_tokens.weight": (9, 32)}, r"of another shape: model.embed_tokens.weight \(9, 32\)"),
    ],
)
def test_other_tensors_are_one_sentence(
    hpsv3_folder: Path,
    official_hpsv3: Official,
    tmp_path: Path,
    dropped: str,
    added: dict[str, tuple[int, ...]],
    message: str,
) -> None:
    tensors = load_file(hpsv3_folder / "HPSv3.safetensors")
    tensors.pop(dropped, None)
    tensors |= {name: torch.zeros(shape) for name, shape in added.items()}
    save_file(tensors, tmp_path / "HPSv3.safetensors")
    with pytest.raises(UserError, match=rf"HPSv3\.safetensors' is not of .*{message}"):
        load(hpsv3_folder, path=str(tmp_path), base=str(hpsv3_folder))


def test_truncated_file_is_one_sentence(hpsv3_folder: Path, official_hpsv3: Official, tmp_path: Path) -> None:
    (tmp_path / "HPSv3.safetensors").write_bytes((hpsv3_folder / "HPSv3.safetensors").read_bytes()[:20000])
    with pytest.raises(UserError, match=r"cannot read weights from '.*HPSv3\.safetensors'"):
        load(hpsv3_folder, path=str(tmp_path), base=str(hpsv3_folder))


def test_missing_base_is_one_sentence(hpsv3_folder: Path, official_hpsv3: Official, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"check reward\.base"):
        load(hpsv3_folder, base=str(tmp_path))


def test_reserved_tokens_in_a_prompt_are_one_sentence(hpsv3_folder: Path, official_hpsv3: Official) -> None:
    reward = load(hpsv3_folder)
    for token in ("<|Reward|>", "<|image_pad|>"):
        with pytest.raises(UserError, match=r"prompt 'a .*' holds"):
            reward(smooth_images(64, 64), ["fine", f"a {token}"])
