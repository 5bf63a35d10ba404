"""Filling a cache: what is there is not encoded again, after any interruption, in the memory of a shard."""

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
from command_line import TINY
from prompt_caches import CPU, ENCODERS, assert_equal, filled, prompts_of, write

from leapalign import models
from leapalign.cli import main
from leapalign.config import ModelConfig
from leapalign.inputs.validation import UserError
from leapalign.models import encode_prompts
from leapalign.planning.ledger import StorageLedger
from leapalign.prompts.cache import PromptCache
from leapalign.prompts.embeddings import CachedEmbeddings
from leapalign.prompts.filling import SHARD_ROWS, fill_cache


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
    deadline = time.monotonic() + 1200
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


def test_a_bad_line_is_found_before_anything_is_encoded(tmp_path: Path, model: ModelConfig) -> None:
    (tmp_path / "bad.txt").write_bytes(b"a cat\n" * 500 + b"\xff\n")
    with pytest.raises(UserError, match="not UTF-8"):
        fill_cache(tmp_path / "cache", model, tmp_path / "bad.txt", CPU)
    assert not (tmp_path / "cache").exists()


def test_a_full_disk_is_one_sentence(tmp_path: Path, model: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("leapalign.prompts.cache.save_file", full)
    with pytest.raises(UserError, match=r"No space left on device.*make room"):
        filled(tmp_path, model, prompts_of(1))


def test_a_cache_is_filled_by_one_process_at_a_time(tmp_path: Path, model: ModelConfig) -> None:
    cache = PromptCache(tmp_path / "cache")
    with cache.being_filled(), pytest.raises(UserError, match=rf"is being filled by process {os.getpid()}; wait"):
        filled(tmp_path, model, prompts_of(3))
    assert filled(tmp_path, model, prompts_of(3))["encoded"] == 3
