"""``leapalign evaluate`` and ``generate``: what is scored and shown, with which weights, and how much is in memory."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import last_json, refused
from PIL import Image
from small_runs import config_of, train

from leapalign.cli import main
from leapalign.evaluation import generate as generating
from leapalign.evaluation import image_folder
from leapalign.evaluation.evaluate import BASE, RUN, evaluate, evaluation_rewards, summary
from leapalign.evaluation.generate import generate
from leapalign.evaluation.page import EvaluationPage
from leapalign.evaluation.statistics import mean_interval
from leapalign.inputs.validation import UserError
from leapalign.models import encode_prompts, load_model
from leapalign.runs.checkpoint import run_weights

EVIL = '<script>alert("a cross")</script>'
PROMPTS = ["a circle", "two squares", EVIL]


@pytest.fixture(scope="module")
def run(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its last weights are far from the base's and its average is not."""
    folder = tmp_path_factory.mktemp("evaluate") / "run"
    train(config_of(parts, folder, "train.iterations=2", "ema.decay=0.999", "optimizer.learning_rate=3e-2"))
    return folder


def prompt_file(folder: Path) -> Path:
    path = folder / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return path


def two_rewards(parts: Path) -> str:
    one = f"{{name: pickscore, path: {parts / 'reward'}}}"
    other = f"{{name: clipscore, path: {parts / 'reward'}}}"
    return f"evaluate.rewards=[{one}, {other}, {one}]"


def test_several_rewards_are_scored_by_hand(
    parts: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Means of base and run and the paired difference, as the model and each reward give them one by one."""
    arguments = ["--prompts", str(prompt_file(tmp_path)), "--seed", "5", "--json", "--weights", "last"]
    assert main(["evaluate", "--run", str(run), *arguments, two_rewards(parts)]) == 0
    found: Any = last_json(capsys)["rewards"]
    assert list(found) == ["pickscore", "clipscore", "pickscore_2"]
    assert found["pickscore"] == found["pickscore_2"]

    config = config_of(parts, run, two_rewards(parts))
    embeddings = encode_prompts(config.model, PROMPTS)
    values = {}
    for arm in (BASE, RUN):
        model = load_model(config.model)
        if arm == RUN:
            kind = type(model.transformer)
            model.transformer = kind.from_pretrained(run_weights(run, "last")).eval()
        images = generate(model, embeddings, range(5, 8), config.rollout.num_steps)
        values[arm] = {name: reward(images, PROMPTS) for name, reward in evaluation_rewards(config).items()}
    for name in ("pickscore", "clipscore"):
        base, of_run = values[BASE][name], values[RUN][name]
        assert not torch.equal(base, of_run)
        for key, expected in (("base", base), ("run", of_run), ("difference", of_run - base)):
            interval = mean_interval(expected.tolist()).to_json()
            assert found[name][key] == pytest.approx(interval, rel=1e-3, abs=1e-5)


def test_the_difference_is_paired() -> None:
    """Images differ much, their differences hardly: an unpaired interval would hide the gain."""
    scores = {BASE: {"r": [0.0, 10.0, 20.0]}, RUN: {"r": [1.0, 11.0, 21.1]}}
    found = summary(scores)["r"]
    assert found["difference"].mean == pytest.approx(1.0333, abs=1e-3)
    assert found["difference"].low > 0.8
    assert found["run"].low < found["base"].mean
    assert set(summary({BASE: scores[BASE]})["r"]) == {"base"}


def test_without_a_list_the_trained_reward_is_scored(parts: Path) -> None:
    assert list(evaluation_rewards(config_of(parts, parts / "none"))) == ["pickscore"]


def test_shares_of_the_objective_are_no_options_of_its_rewards(parts: Path) -> None:
    one = f"{{name: pickscore, path: {parts / 'reward'}, weight: 2, threshold: 0.5}}"
    config = config_of(parts, parts / "none", f"reward=[{one}, {one}]")
    assert list(evaluation_rewards(config)) == ["pickscore", "pickscore_2"]


def test_few_images_and_one_model_at_a_time(
    parts: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(parts, run, "rollout.batch_size=2")
    models: list[weakref.ref[Any]] = []
    load = generating.load_model

    def counted(settings: Any) -> Any:
        assert all(model() is None for model in models), "the one before is still in memory"
        model = load(settings)
        models.append(weakref.ref(model.transformer))
        return model

    monkeypatch.setattr(generating, "load_model", counted)
    batches: list[tuple[int, list[str]]] = []

    def reward(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        batches.append((len(images), prompts))
        return images.mean((1, 2, 3))

    gc.disable()
    try:
        arms = {BASE: None, RUN: run_weights(run, "average")}
        scores = evaluate(config, arms, {"mean": reward}, PROMPTS, encode_prompts(config.model, PROMPTS), 0)
    finally:
        gc.enable()
    assert batches == [(2, PROMPTS[:2]), (1, PROMPTS[2:])] * 2
    assert len(models) == 2
    assert all(len(of["mean"]) == 3 for of in scores.values())


def test_the_page_shows_pairs_and_escapes_all_text(parts: Path, run: Path, tmp_path: Path) -> None:
    page = tmp_path / "page"
    arguments = ["--run", str(run), "--prompts", str(prompt_file(tmp_path)), "--weights", "last"]
    assert main(["evaluate", *arguments, "--page", str(page), two_rewards(parts)]) == 0
    text = (page / "index.html").read_text()
    assert "<script" not in text
    # A heading, and the description of two pictures.
    assert text.count("&lt;script&gt;") == 3
    for number in range(3):
        base, of_run = (page / arm / f"{number:05d}.png" for arm in ("base", "run"))
        assert text.index(f"base/{base.name}") < text.index(f"run/{of_run.name}")
        assert Image.open(base).size == (64, 64)
        assert base.read_bytes() != of_run.read_bytes()
    assert text.count("clipscore ") == 6, "under each picture"


def test_long_pages_show_the_first_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leapalign.evaluation.page.SHOWN", 3)
    page = EvaluationPage(tmp_path / "page")
    for start in (0, 2, 4):
        page.keep(BASE, start, torch.rand(2, 3, 4, 4))
    text = page.write([f"prompt {number}" for number in range(6)], {BASE: {"r": [0.5] * 6}}, "25 steps").read_text()
    assert "the first 3 of 6" in text
    assert len(list((page.folder / BASE).iterdir())) == text.count("<img") == 3


def test_a_page_is_not_written_over(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(["evaluate", "--run", str(run), "--page", str(tmp_path)], capsys)
    assert "already exists; choose another --page" in message


def test_rewards_without_name_are_refused(parts: Path) -> None:
    with pytest.raises(UserError, match=r"a reward of evaluate\.rewards has no name"):
        config_of(parts, parts / "none", "evaluate.rewards=[{path: x}]")


def test_weights_of_another_model_are_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before the base's images are made."""
    assert main(["evaluate", "--run", str(run), "model.lora_rank=2"]) == 2
    printed = capsys.readouterr()
    assert "does not fit" in printed.err
    assert "base:" not in printed.err


def pictures(folder: Path, *arguments: str) -> list[bytes]:
    assert main(["generate", "--output", str(folder), "--prompt", "a circle", *arguments]) == 0
    return [path.read_bytes() for path in sorted(folder.glob("0*.png"))]


def test_generate_has_the_average_unless_asked(parts: Path, run: Path, tmp_path: Path) -> None:
    default, average, last = (
        pictures(tmp_path / name, "--run", str(run), *asked)
        for name, asked in (("a", []), ("b", ["--weights", "average"]), ("c", ["--weights", "last"]))
    )
    assert default == average
    assert default != last


def test_the_grid_holds_the_first_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_folder, "IN_GRID", 3)
    files = [tmp_path / f"{number}.png" for number in range(6)]
    batches = (torch.rand(2, 3, 8, 8) for _ in range(3))
    image_folder.save_images(batches, ["a prompt"] * 6, files, tmp_path)
    assert all(file.exists() for file in files)
    assert Image.open(tmp_path / "grid.png").height < 300, "one row"


def test_genevals_prompts_give_its_folders(run: Path, tmp_path: Path) -> None:
    records = [
        {"tag": "single_object", "include": [{"class": "cross", "count": 1}], "prompt": "a red cross"},
        {"tag": "counting", "include": [{"class": "circle", "count": 4}], "prompt": "four circles"},
    ]
    file, output = tmp_path / "prompts.jsonl", tmp_path / "images"
    file.write_text("\n\n".join(map(json.dumps, records)))
    assert main(["generate", "--run", str(run), "--prompts", str(file), "--output", str(output)]) == 0
    for index, record in enumerate(records):
        folder = output / f"{index:05d}"
        assert json.loads((folder / "metadata.jsonl").read_text()) == record
        assert [path.name for path in (folder / "samples").iterdir()] == ["00000.png"]
    first, second = ((output / f"0000{index}" / "samples" / "00000.png").read_bytes() for index in range(2))
    assert first != second


def test_other_json_lines_give_plain_images(run: Path, tmp_path: Path) -> None:
    file, output = tmp_path / "prompts.jsonl", tmp_path / "images"
    file.write_text('{"prompt": "a circle", "tag": "x"}\n')
    assert main(["generate", "--run", str(run), "--prompts", str(file), "--output", str(output)]) == 0
    assert sorted(path.name for path in output.iterdir()) == ["00000.png", "grid.png"]
