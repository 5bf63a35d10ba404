"""Embeddings from disk: the same bits as from the text encoders, after any interruption, without them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from leapalign import models
from leapalign.cli import main
from leapalign.config import Config, ModelConfig, PromptsConfig, load_config
from leapalign.inputs.validation import UserError
from leapalign.models import encode_prompts
from leapalign.models.embeddings import PromptEmbeddings
from leapalign.models.velocity import GuidedEmbeddings
from leapalign.planning.ledger import StorageLedger
from leapalign.prompts.cache import PromptCache, hash_of
from leapalign.prompts.embeddings import CachedEmbeddings, embeddings_of
from leapalign.prompts.filling import SHARD_ROWS, fill_cache
from leapalign.tiny.model import build_pooled_encoder, build_token_encoder, build_transformer, save_model
from leapalign.tiny.world import COLORS, SHAPES
from leapalign.trainer import Trainer

TINY = str(Path(__file__).parents[2] / "configs" / "tiny.yaml")
CPU = torch.device("cpu")
ENCODERS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")


def prompts_of(count: int) -> list[str]:
    """All different, also for the tiny model's tokenizer in most cases."""
    colors, shapes = list(COLORS), list(SHAPES)
    return [
        f"a {colors[n % len(colors)]} {shapes[n // 7 % len(shapes)]} and {n} {colors[n // 3 % len(colors)]}"
        for n in range(count)
    ]


def write(path: Path, prompts: list[str]) -> Path:
    path.write_text("".join(f"{prompt}\n" for prompt in prompts))
    return path


@pytest.fixture
def model(tmp_path: Path) -> ModelConfig:
    """A random tiny FLUX."""
    save_model(tmp_path / "model", build_transformer(), build_pooled_encoder(), build_token_encoder())
    return ModelConfig(path=str(tmp_path / "model"))


def filled(tmp_path: Path, model: ModelConfig, prompts: list[str]) -> dict[str, Any]:
    return fill_cache(tmp_path / "cache", model, write(tmp_path / "prompts.txt", prompts), CPU)


def assert_equal(found: PromptEmbeddings, expected: PromptEmbeddings) -> None:
    assert found.parts.keys() == expected.parts.keys()
    for name, part in expected.parts.items():
        assert found.parts[name].dtype == part.dtype
        assert torch.equal(found.parts[name], part), name


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


def run(config: Config) -> tuple[list[dict[str, float]], torch.Tensor]:
    trainer = Trainer.from_config(config)
    records = [{name: value for name, value in record.items() if name != "seconds"} for record in trainer.run()]
    return records, torch.cat([p.detach().flatten() for p in trainer.model.transformer.parameters()])


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


def test_only_what_is_missing_is_encoded(tmp_path: Path, model: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = prompts_of(SHARD_ROWS + 10)
    assert filled(tmp_path, model, prompts[:20])["encoded"] == 20
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache" / "shards").iterdir()}
    asked = []
    monkeypatch.setattr(
        "leapalign.prompts.filling.encoded",
        lambda encode, rows: asked.extend(rows) or models.encoded(encode, rows),
    )
    result = filled(tmp_path, model, [*prompts, *prompts])
    assert (result["encoded"], result["reused"]) == (SHARD_ROWS - 10, 20)
    assert asked == prompts[20:] * 2, "once by each text encoder"
    assert all(path.stat().st_mtime_ns == written for path, written in before.items())
    assert result["bytes"] == sum(p.stat().st_size for p in (tmp_path / "cache" / "shards").iterdir())


def test_a_full_cache_loads_no_text_encoder(tmp_path: Path, model: ModelConfig) -> None:
    filled(tmp_path, model, prompts_of(3))
    for name in ENCODERS:
        shutil.rmtree(tmp_path / "model" / name)
    assert filled(tmp_path, model, prompts_of(3))["reused"] == 3
    with pytest.raises(UserError, match="has no text_encoder, which prompts are encoded with"):
        filled(tmp_path, model, prompts_of(4))


@pytest.mark.parametrize("fill", [True, False], ids=["cache", "encode_prompts"])
def test_one_text_encoder_at_a_time(
    tmp_path: Path, model: ModelConfig, monkeypatch: pytest.MonkeyPatch, fill: bool
) -> None:
    text_encoders = sys.modules["leapalign.models.text_encoders"]
    load, loaded, alive = text_encoders.load_pipeline, [], []

    def watched(*arguments: Any) -> Any:
        alive.append(sum(reference() is not None for reference in loaded))
        pipeline = load(*arguments)
        loaded.append(weakref.ref(pipeline.text_encoder or pipeline.text_encoder_2))
        return pipeline

    monkeypatch.setattr(text_encoders, "load_pipeline", watched)
    filled(tmp_path, model, prompts_of(3)) if fill else encode_prompts(model, prompts_of(3))
    assert alive == [0, 0]


@pytest.mark.slow
@pytest.mark.posix
def test_kill_loses_at_most_a_shard(tmp_path: Path, model: ModelConfig, capsys: pytest.CaptureFixture[str]) -> None:
    count, cache = 12 * SHARD_ROWS, tmp_path / "cache"
    prompts = write(tmp_path / "prompts.txt", prompts_of(count))
    arguments = [
        "cache",
        "--config",
        TINY,
        "--prompts",
        str(prompts),
        "--output",
        str(cache),
        f"model.path={model.path}",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "leapalign.cli", *arguments],
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 120
    while len(PromptCache(cache).shards(1)) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {path: path.stat().st_mtime_ns for path in PromptCache(cache).shards(1)}
    assert 2 <= len(done) < 12, "killed on the way"
    with pytest.raises(UserError, match="unfinished; run leapalign cache"):
        CachedEmbeddings(cache, model, prompts_of(1))

    assert main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["encoders"][0] == {"encoded": 0, "reused": count}
    assert result["encoders"][1] == {"encoded": count - len(done) * SHARD_ROWS, "reused": len(done) * SHARD_ROWS}
    assert all(path.stat().st_mtime_ns == written for path, written in done.items())
    chosen = prompts_of(count)[:: SHARD_ROWS - 1]
    assert_equal(CachedEmbeddings(cache, model, chosen)[:], encode_prompts(model, chosen))
    assert not list((cache / "unfinished").iterdir())


def test_prompts_stream(tmp_path: Path, model: ModelConfig) -> None:
    """Four times as many prompts need only their hashes more."""

    def peaks(count: int) -> tuple[int, int]:
        prompts = write(tmp_path / "prompts.txt", [f"{prompt} and" + 500 * " a" for prompt in prompts_of(count)])
        tracemalloc.start()
        with StorageLedger() as ledger:
            fill_cache(tmp_path / f"cache-{count}", model, prompts, CPU)
        python = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return ledger.peak, python

    peaks(1)  # imports what it needs
    few, many = (peaks(shards * SHARD_ROWS) for shards in (1, 4))
    assert many[0] <= few[0] * 1.01
    more = 3 * SHARD_ROWS
    assert many[1] - few[1] < more * 500 < more * len(500 * " a")


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


def test_a_full_disk_is_one_sentence(tmp_path: Path, model: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("leapalign.prompts.cache.save_file", full)
    with pytest.raises(UserError, match=r"No space left on device.*make room"):
        filled(tmp_path, model, prompts_of(1))


def test_a_bad_line_is_found_before_anything_is_encoded(tmp_path: Path, model: ModelConfig) -> None:
    (tmp_path / "bad.txt").write_bytes(b"a cat\n" * 500 + b"\xff\n")
    with pytest.raises(UserError, match="not UTF-8"):
        fill_cache(tmp_path / "cache", model, tmp_path / "bad.txt", CPU)
    assert not (tmp_path / "cache").exists()


def test_commands_read_from_the_cache(tmp_path: Path, model: ModelConfig, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"tag": "two", "include": [], "prompt": p}) + "\n" for p in prompts_of(2)))
    given = ("--config", TINY, "--prompts", str(prompts), f"model.path={model.path}", "rollout.num_steps=2")
    cached = f"prompts.cache={tmp_path / 'cache'}"
    assert main(["evaluate", *given, "--json"]) == 0
    plain = capsys.readouterr().out
    assert main(["cache", *given, cached]) == 0
    for name in ENCODERS:
        shutil.rmtree(tmp_path / "model" / name)
    capsys.readouterr()
    assert main(["evaluate", *given, cached, "--json"]) == 0
    assert capsys.readouterr().out == plain
    assert main(["generate", *given, cached, "--output", str(tmp_path / "images")]) == 0
    capsys.readouterr()
    assert main(["generate", *given, cached, "--output", str(tmp_path / "none"), "--prompt", "two cats"]) == 2
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


def test_a_cache_is_filled_by_one_process_at_a_time(tmp_path: Path, model: ModelConfig) -> None:
    cache = PromptCache(tmp_path / "cache")
    with cache.being_filled(), pytest.raises(UserError, match=rf"is being filled by process {os.getpid()}; wait"):
        filled(tmp_path, model, prompts_of(3))
    assert filled(tmp_path, model, prompts_of(3))["encoded"] == 3


def test_a_folder_of_something_else_stays_as_it_is(tmp_path: Path, model: ModelConfig) -> None:
    photo = tmp_path / "cache" / "photo.png"
    photo.parent.mkdir()
    photo.touch()
    with pytest.raises(UserError, match="holds files of something else"):
        filled(tmp_path, model, prompts_of(3))
    assert list(photo.parent.iterdir()) == [photo]
