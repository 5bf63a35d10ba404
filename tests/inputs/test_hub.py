"""What cannot be read by its hub id, or is a folder that is not there: which, and what to do, in one sentence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import TINY, refused
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from fake_hub import fake_hub
from transformers import CLIPModel, T5TokenizerFast

from leapalign.inputs.networks import read_network
from leapalign.inputs.tokenizers import read_tokenizer
from leapalign.inputs.validation import UserError
from leapalign.models.folder import ModelFolder, linear_widths, read_index
from leapalign.rewards import get_reward
from leapalign.rewards.checkpoint_files import find_file
from leapalign.rewards.clip_scorer import read_clip
from leapalign.storage.embedded import FOLDER

SENTENCES = {
    "gated/model": r"accepted its licence; accept it on https://huggingface\.co/gated/model, then log in with `hf auth",
    "none/model": "neither a folder here nor a repository of the hub that you may see; check {setting}, or log in",
    "hidden/model": "neither a folder here nor a repository of the hub that you may see; check {setting}, or log in",
    "token/model": "the hub refuses your token for 'token/model'; log in again with `hf auth login`, or correct HF_TO",
    "./flux": r"there is no folder '\./flux', and it can be no hub id; check {setting}$",
    "/data/flux": "there is no folder '/data/flux', and it can be no hub id; check {setting}$",
}
OFFLINE = (
    r"'some/model' is no folder here, and the hub could not be reached \(HF_HUB_OFFLINE is set\); where there is a "
    r"network, run `hf download some/model --local-dir DIR`, then set {setting}=DIR$"
)
F32 = torch.float32
LOADERS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "index": ("model.path", read_index),
    "scheduler": ("model.path", lambda path: part(path).part(FlowMatchEulerDiscreteScheduler, "scheduler")),
    "vae": ("model.path", lambda path: part(path).part(AutoencoderKL, "vae")),
    "linear widths": ("model.path", linear_widths),
    "CLIP": ("reward.tower", lambda path: read_network(CLIPModel, path, F32, "CLIP", "reward.tower")),
    "T5's tokenizer": ("x", lambda path: read_tokenizer(path, "it", "x", "tokenizer_2", T5TokenizerFast)),
    "pickscore": ("reward.path", lambda path: get_reward("pickscore", path=path)),
    "its processor": ("reward.processor", lambda path: read_clip(str(FOLDER / "reward"), path, "float32")),
}
FILES: dict[str, tuple[str, Callable[[str], Any]]] = {
    "hpsv2": ("reward.path", lambda path: get_reward("hpsv2", path=path)),
    "hpsv3": ("reward.path", lambda path: get_reward("hpsv3", path=path)),
    "imagereward": ("reward.path", lambda path: get_reward("imagereward", path=path)),
    "aesthetic": ("reward.path", lambda path: get_reward("aesthetic", path=path)),
}
"""Rewards that come as one file, which a path with a folder in it means, too."""


def part(path: str) -> ModelFolder:
    return ModelFolder(path, F32)


@pytest.fixture(scope="module", autouse=True)
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with fake_hub(str(tmp_path_factory.mktemp("hub"))):
        yield


@pytest.mark.parametrize("path", SENTENCES)
@pytest.mark.parametrize("loader", LOADERS)
def test_every_loader_says_why(loader: str, path: str) -> None:
    setting, load = LOADERS[loader]
    with pytest.raises(UserError, match=SENTENCES[path].format(setting=setting)):
        load(path)


@pytest.mark.parametrize("path", ["gated/model", "none/model"])
@pytest.mark.parametrize("name", FILES)
def test_every_reward_of_one_file_says_why(name: str, path: str) -> None:
    setting, load = FILES[name]
    with pytest.raises(UserError, match=SENTENCES[path].format(setting=setting)):
        load(path)


@pytest.mark.parametrize("loader", LOADERS | FILES)
def test_offline_is_no_word_on_the_model(loader: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    setting, load = (LOADERS | FILES)[loader]
    with pytest.raises(UserError, match=OFFLINE.format(setting=setting)):
        load("some/model")


def test_a_network_that_is_down_is_told_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a connection that is refused, which the hub's library would try again for half a minute."""
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}{filename}"
    )
    monkeypatch.setattr("huggingface_hub.file_download.hf_hub_url", lambda *_, **__: "http://127.0.0.1:9/")
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    with pytest.raises(UserError, match=r"could not be reached \(.*refused\); where"):
        find_file("some/model", ("a.pt",))


def test_a_repository_without_the_file_is_there() -> None:
    with pytest.raises(UserError, match=r"'bare/model' is no model in diffusers layout, with a model_index\.json"):
        read_index("bare/model")
    with pytest.raises(UserError, match=r"^'bare/model' is no model in diffusers layout"):
        linear_widths("bare/model")
    for path in ("bare/model", "bare/model-v2.1"):
        with pytest.raises(UserError, match=rf"cannot download a\.pt from '{path}' .*check reward\.path"):
            find_file(path, ("a.pt",))


@pytest.mark.parametrize("command", ["train", "evaluate", "generate", "cache", "memory"])
def test_every_command_says_so(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = ["--output", str(tmp_path / "out")] if command in ("generate", "cache") else [f"output={tmp_path / 'out'}"]
    line = refused([command, "--config", TINY, *output, "model.path=gated/model"], capsys)
    assert "accept it on https://huggingface.co/gated/model" in line
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_without_vocabulary_is_refused(tmp_path: Path) -> None:
    """Transformers makes one that knows no words of a folder that holds none."""
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"cannot load it of '.*' \(there is no vocabulary in its files\); check x$"):
        read_tokenizer(str(tmp_path), "it", "x", kind=T5TokenizerFast)
