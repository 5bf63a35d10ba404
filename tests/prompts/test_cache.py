"""Embeddings from disk: the same bits as from the text encoders, and training without them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from command_line import TINY
from prompt_caches import CPU, ENCODERS, assert_equal, filled, prompts_of, write

from leapalign.cli import main
from leapalign.config import Config, ModelConfig, PromptsConfig, load_config
from leapalign.inputs.validation import UserError
from leapalign.models import encode_prompts
from leapalign.models.embeddings import PromptEmbeddings
from leapalign.models.velocity import GuidedEmbeddings
from leapalign.prompts.cache import PromptCache, hash_of
from leapalign.prompts.embeddings import CachedEmbeddings, embeddings_of
from leapalign.prompts.filling import SHARD_ROWS, fill_cache
from leapalign.trainer import Trainer


def run(config: Config) -> tuple[list[dict[str, float]], torch.Tensor]:
    trainer = Trainer.from_config(config)
    records = [{name: value for name, value in record.items() if name != "seconds"} for record in trainer.run()]
    return records, torch.cat([p.detach().flatten() for p in trainer.model.transformer.parameters()])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_are_those_of_the_text_encoders(tmp_path: Path, model: ModelConfig, dtype: str) -> None:
    model = ModelConfig(path=model.path, dtype=dtype)  # type: ignore[arg-type]
    prompts = prompts_of(2 * SHARD_ROWS + 5)
    filled(tmp_path, model, [*prompts[:9], *prompts])
    cached, direct = CachedEmbeddings(tmp_path / "cache", model, prompts), encode_prompts(model, prompts)
    assert len(cached) == len(prompts)
    assert_equal(cached[:], direct)
    chosen = torch.tensor([SHARD_ROWS, 3, 3, 2 * SHARD_ROWS + 4, 0])
    assert_equal(cached[chosen], direct[chosen])
    assert not torch.equal(direct.parts["tokens"][0], direct.parts["tokens"][1])


def test_the_negative_prompt_is_cached_too(tmp_path: Path, model: ModelConfig) -> None:
    model = ModelConfig(path=model.path, true_cfg_scale=3.0, negative_prompt="a cross")
    filled(tmp_path, model, prompts_of(3))
    config = Config(model=model, prompts=PromptsConfig(cache=str(tmp_path / "cache")))
    cached, direct = embeddings_of(config, prompts_of(3)), encode_prompts(model, prompts_of(3))
    assert isinstance(cached, GuidedEmbeddings)
    assert_equal(cached.negative, direct.negative)
    assert_equal(cached[torch.tensor([2, 0])].prompts, direct[torch.tensor([2, 0])].prompts)


@pytest.mark.parametrize("scale", [1, 3])
def test_training_from_the_cache_is_training_without_text_encoders(
    tmp_path: Path, model: ModelConfig, scale: int
) -> None:
    prompts = write(tmp_path / "prompts.txt", [*prompts_of(5), prompts_of(5)[0]])
    asked = (
        f"model.path={model.path}",
        f"model.true_cfg_scale={scale}",
        f"prompts.path={prompts}",
        f"output={tmp_path / 'run'}",
        "rollout.num_steps=3",
        "rollout.batch_size=4",
        "train.batch_size=4",
        "train.iterations=2",
    )
    config = load_config(Path(TINY), asked)
    plain = run(config)
    fill_cache(tmp_path / "cache", config.model, prompts, CPU)
    for name in ENCODERS:
        shutil.rmtree(tmp_path / "model" / name)
    with pytest.raises(
        UserError, match=r"has no text_encoder, .*; set model\.path to the complete folder, or prompts\.c"
    ):
        Trainer.from_config(config)
    cached = run(load_config(Path(TINY), [*asked, f"prompts.cache={tmp_path / 'cache'}"]))
    assert cached[0] == plain[0]
    assert torch.equal(cached[1], plain[1])


def test_commands_read_from_the_cache(tmp_path: Path, model: ModelConfig, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"tag": "two", "include": [], "prompt": p}) + "\n" for p in prompts_of(2)))
    given = ("--config", TINY, "--prompts", str(prompts), f"model.path={model.path}", "rollout.num_steps=2")
    cached = f"prompts.cache={tmp_path / 'cache'}"
    assert main(["evaluate", *given, "--json"]) == 0
    plain = capsys.readouterr().out
    assert main(["cache", *given, cached]) == 0
    two_cats = ("--prompt", "two cats", "--output")
    assert main(["generate", *given, cached, *two_cats, str(tmp_path / "encoded")]) == 0
    for name in ENCODERS:
        shutil.rmtree(tmp_path / "model" / name)
    capsys.readouterr()
    assert main(["evaluate", *given, cached, "--json"]) == 0
    assert capsys.readouterr().out == plain
    assert main(["generate", *given, cached, "--output", str(tmp_path / "images")]) == 0
    spaced = ("--prompt", f" {prompts_of(2)[1]}\n", "--output", str(tmp_path / "spaced"))
    assert main(["generate", *given, cached, *spaced]) == 0
    capsys.readouterr()
    assert main(["generate", *given, cached, *two_cats, str(tmp_path / "none")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "lacks 1 of 1 prompts, the first being 'two cats'; run leapalign cache" in line
    assert not (tmp_path / "none").exists()


def test_shorter_texts_are_padded(tmp_path: Path, model: ModelConfig) -> None:
    """As a family would store them whose texts have various lengths, and a mask."""
    filled(tmp_path, model, prompts_of(2))
    cache = PromptCache(tmp_path / "cache")
    for shard in cache.shards(1):
        shard.unlink()
    for prompt, length in zip(prompts_of(2), (3, 5), strict=True):
        parts = {"tokens": torch.ones(1, length, 4), "mask": torch.ones(1, length, dtype=torch.bool)}
        cache.add(1, [hash_of(prompt)], PromptEmbeddings(parts))
    cached = CachedEmbeddings(tmp_path / "cache", model, prompts_of(2))
    assert cached[:1].parts["tokens"].shape == (1, 3, 4)
    both = cached[torch.tensor([1, 0])].parts
    assert both["mask"].tolist() == [[True] * 5, [True] * 3 + [False] * 2]
    assert torch.equal(both["tokens"][..., 0], both["mask"].float())
