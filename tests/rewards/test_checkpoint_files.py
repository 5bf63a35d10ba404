"""Checkpoints of rewards: found, read without running code, refused in one sentence."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from leapalign.inputs.validation import UserError
from leapalign.rewards.checkpoint_files import find_file, load_tensors, read_tensors

TENSORS = {"weight": torch.arange(6.0).view(2, 3), "bias": torch.ones(2)}
NAMES = ("first.pt", "second.safetensors")


class Attack:
    def __reduce__(self) -> tuple[Callable[[str], Any], tuple[str]]:
        return os.mkdir, ("pwned",)


def test_both_formats_read_the_same(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "flat.pt")
    torch.save({"state_dict": TENSORS, "epoch": 3}, tmp_path / "deep.pt")
    torch.save(TENSORS, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file(TENSORS, tmp_path / "flat.safetensors")
    for name in ("flat.pt", "deep.pt", "old.pth", "flat.safetensors"):
        found = read_tensors(tmp_path / name, key="state_dict")
        assert found.keys() == TENSORS.keys()
        assert all(torch.equal(found[key], TENSORS[key]) for key in TENSORS)


def test_files_are_found_by_name_and_order(tmp_path: Path) -> None:
    second = tmp_path / NAMES[1]
    second.touch()
    assert find_file(str(tmp_path), NAMES) == find_file(str(second), NAMES) == second
    (tmp_path / NAMES[0]).touch()
    assert find_file(str(tmp_path), NAMES) == tmp_path / NAMES[0]


@pytest.mark.parametrize("path", ["no/such/folder", "/no/file", "file.pt", "folder/file.pt", "name"])
def test_what_is_no_file_is_no_download(path: str) -> None:
    with pytest.raises(UserError, match=rf"there is no file '{path}'; check reward\.head"):
        find_file(path, NAMES, "reward.head")


def test_an_empty_folder_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no first\.pt or second\.safetensors"):
        find_file(str(tmp_path), NAMES)


def test_damaged_files_are_one_sentence(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "whole.pt")
    save_file(TENSORS, tmp_path / "whole.safetensors")
    for name in ("whole.pt", "whole.safetensors"):
        content = (tmp_path / name).read_bytes()
        for size in (0, 10, len(content) // 2, len(content) - 1):
            damaged = tmp_path / f"damaged{Path(name).suffix}"
            damaged.write_bytes(content[:size])
            with pytest.raises(UserError, match=r"cannot read weights from '.*damaged\.\w+' .*download the file again"):
                read_tensors(damaged)
    (tmp_path / "page.pt").write_text("<html>Not found</html>")
    with pytest.raises(UserError, match=r"page\.pt"):
        read_tensors(tmp_path / "page.pt")


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
def test_weights_that_are_not_finite_are_named(tmp_path: Path, name: str) -> None:
    tensors = {**TENSORS, "head.bias": torch.tensor([1.0, float("nan")])}
    (torch.save if name.endswith("pt") else save_file)(tensors, tmp_path / name)
    with pytest.raises(UserError, match=rf"head\.bias in '.*{name}' holds NaN or infinite numbers; download"):
        read_tensors(tmp_path / name)


def test_code_in_a_file_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": Attack()}, tmp_path / "zip.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Attack(), protocol=2))
    for name in ("zip.pt", "plain.pt"):
        with pytest.raises(UserError, match="cannot read weights"):
            read_tensors(tmp_path / name)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("content", [TENSORS["bias"], {"state_dict": [1]}, {"weight": "large"}])
def test_what_is_no_state_dict_is_one_sentence(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "odd.pt")
    with pytest.raises(UserError, match=r"odd\.pt' holds no state dict"):
        read_tensors(tmp_path / "odd.pt", key="state_dict")


def test_faults_are_named_the_first_three_of_a_kind() -> None:
    module = nn.Linear(3, 2)
    load_tensors(module, {key: value.double() for key, value in TENSORS.items()}, Path("a.pt"))
    assert torch.equal(module.weight, TENSORS["weight"])
    wrong = {"weight": torch.ones(3, 2), **{f"extra{n}": torch.ones(1) for n in range(5)}}
    with pytest.raises(UserError) as caught:
        load_tensors(module, wrong, Path("b.pt"))
    assert str(caught.value) == (
        "'b.pt' is not of this model (missing: bias; unexpected: extra0, extra1, extra2 and 2 more; of another shape: "
        "weight (3, 2) instead of (2, 3)); use the published file"
    )
