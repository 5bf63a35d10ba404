"""Caches that are damaged, of another model or no caches at all are told and left alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from prompt_caches import CPU, assert_equal, filled, prompts_of, write

from leapalign.config import ModelConfig
from leapalign.inputs.validation import UserError
from leapalign.models import encode_prompts
from leapalign.prompts.cache import PromptCache
from leapalign.prompts.embeddings import CachedEmbeddings
from leapalign.prompts.filling import SHARD_ROWS, fill_cache
from leapalign.tiny.model import build_token_encoder


def test_a_torn_shard_is_one_sentence_and_encoded_again(tmp_path: Path, model: ModelConfig) -> None:
    prompts = prompts_of(SHARD_ROWS + 4)
    filled(tmp_path, model, prompts)
    cached = CachedEmbeddings(tmp_path / "cache", model, prompts)
    shard = PromptCache(tmp_path / "cache").shards(1)[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    for read in (lambda: cached[:], lambda: CachedEmbeddings(tmp_path / "cache", model, prompts)):
        with pytest.raises(UserError, match=r"shard '.*000001-1.safetensors' .* is damaged .*; run leapalign cache"):
            read()
    assert_equal(cached[:SHARD_ROWS], encode_prompts(model, prompts[:SHARD_ROWS]))
    result = filled(tmp_path, model, prompts)
    assert result["encoders"] == [{"encoded": 0, "reused": len(prompts)}, {"encoded": 4, "reused": SHARD_ROWS}]
    assert_equal(CachedEmbeddings(tmp_path / "cache", model, prompts)[:], encode_prompts(model, prompts))


def test_a_cache_of_another_model_is_refused(tmp_path: Path, model: ModelConfig) -> None:
    filled(tmp_path, model, prompts_of(2))
    moved = ModelConfig(path=str(shutil.copytree(model.path, tmp_path / "moved")))
    assert len(CachedEmbeddings(tmp_path / "cache", moved, prompts_of(2))) == 2
    build_token_encoder().save_pretrained(tmp_path / "moved" / "text_encoder_2")  # the same size, other weights
    for use in (
        lambda: CachedEmbeddings(tmp_path / "cache", moved, prompts_of(2)),
        lambda: filled(tmp_path, moved, prompts_of(3)),
    ):
        with pytest.raises(UserError, match=r"is of the text encoders of '.*model', not of those of '.*moved'"):
            use()
    shutil.rmtree(tmp_path / "moved" / "text_encoder_2")
    with pytest.raises(UserError, match="is of the text encoders of"):
        CachedEmbeddings(tmp_path / "cache", moved, prompts_of(2))
    with pytest.raises(UserError, match="is in float32, and here text encoders run in bfloat16"):
        filled(tmp_path, ModelConfig(path=model.path, dtype="bfloat16"), prompts_of(3))


@pytest.mark.parametrize("manifest", ["", "{", "[]", "{}", '{"model": 3}', "[" * 100_000])
def test_a_damaged_manifest_is_one_sentence(tmp_path: Path, model: ModelConfig, manifest: str) -> None:
    filled(tmp_path, model, prompts_of(1))
    (tmp_path / "cache" / "manifest.json").write_text(manifest)
    with pytest.raises(UserError, match=r"manifest\.json"):
        CachedEmbeddings(tmp_path / "cache", model, prompts_of(1))


def test_folders_of_something_else_are_left_alone(tmp_path: Path, model: ModelConfig) -> None:
    with pytest.raises(UserError, match="is no prompt cache; run leapalign cache"):
        CachedEmbeddings(tmp_path / "none", model, prompts_of(1))
    write(tmp_path / "prompts.txt", prompts_of(1))
    with pytest.raises(UserError, match="holds files of something else"):
        fill_cache(tmp_path, model, tmp_path / "prompts.txt", CPU)
    with pytest.raises(UserError, match="cannot write the prompt cache"):
        fill_cache(tmp_path / "prompts.txt", model, tmp_path / "prompts.txt", CPU)


def test_a_folder_of_something_else_stays_as_it_is(tmp_path: Path, model: ModelConfig) -> None:
    photo = tmp_path / "cache" / "photo.png"
    photo.parent.mkdir()
    photo.touch()
    with pytest.raises(UserError, match="holds files of something else"):
        filled(tmp_path, model, prompts_of(3))
    assert list(photo.parent.iterdir()) == [photo]
