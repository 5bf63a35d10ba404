"""Every command of the pages, in order, by an installed wheel, in a folder without the sources, under another umask.

Models and rewards are the embedded ones, in the configs of the project. A new page of docs/ is found by itself; where
it names what has to be downloaded, or takes long, it needs a line in `STAND_INS` or `PARSED_ONLY`.
"""

from __future__ import annotations

import argparse
import json
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from installed import bare_python, install
from leap_kernels.tools import main as leap_kernels_main
from pages import PAGES, PROGRAMS, ROOT, Command, blocks, commands

from benchmarks.mutations import TINY
from leapalign.cli.main import build_parser
from leapalign.config import load_config

COMMANDS = [command for page in PAGES for command in commands(page)]
STAND_INS = {
    "--resume RUN": "--resume runs/mine",
    "--config CONFIG": "--config configs/tiny.yaml",
    "--config tiny ": "--config configs/tiny.yaml ",
    "--config flux1_dev/80gb": "--config configs/flux1_dev/80gb.yaml",
    "--config flux1_dev/16gb": "--config configs/flux1_dev/16gb.yaml",
    "--config flux1_dev/48gb": "--config configs/flux1_dev/48gb.yaml",
    "--config recipes/flux1_dev/leapalign_hpsv2": "--config configs/recipes/flux1_dev/leapalign_hpsv2.yaml",
    "--config recipes/flux1_dev/leapalign_hpsv3": "--config configs/recipes/flux1_dev/leapalign_hpsv3.yaml",
    "--cases 50000": "--cases 20",
    "--images 96 --steps 30": "--images 4 --steps 4",
}
"""What a command says, and what is run: names in capitals stand for something, and large numbers take minutes."""
PAGE_STAND_INS = {
    "docs/flux.md": {
        " optimizer.learning_rate=5e-6": " optimizer.learning_rate=5e-6 train.iterations=3",
        "--resume runs/flux1_dev": "--resume runs/flux1_dev train.iterations=2",
        "reward='{name: hpsv2, dtype: bfloat16}' ": "",
    },
    "docs/many_gpus.md": {"--processes 8": "--processes 1", "--processes 4": "--processes 1"},
    "docs/methods.md": {"train.iterations=60": "train.iterations=1"},
    "docs/rewards.md": {"reward='{name: hpsv3, quantization: int8}' ": ""},
    "docs/watch.md": {"leapalign train --resume RUN": "PYTHONPATH=. leapalign train --resume runs/grey"},
}
PARSED_ONLY = {
    "make": "a target installs first; `make -n` tells whether it is there",
    ".venv/bin/pre-commit": "it changes the clone",
    "hf": "it downloads",
    "pip": "that is how the wheel gets here",
    "python3 -m venv": "so is this",
    "tensorboard": "it serves until it is stopped",
    "leapalign demo": "three minutes; tests/tiny has it",
    "python -m torch.distributed.run": "tests/parallel has it",
    "python -m pytest": "that is what runs this",
    "python -m leap_kernels audit": "minutes; kernels/tests has it",
    "python -m leap_kernels bench": "minutes; kernels/tests has it",
    "python -m benchmarks.gpu_report": "needs a GPU; tests/benchmarks has it",
    "python -m benchmarks.block_traffic": "half a minute; tests/benchmarks has it",
    "python -m benchmarks.norm_traffic": "tests/benchmarks has it",
    "python -m benchmarks.study": "hours; tests/benchmarks has it",
    "python benchmarks/tiny_study.py": "the demo, three times",
    "python benchmarks/families.py": "minutes of simulations; tests/planning has them",
    "python benchmarks/activation_memory.py": "tests/planning has it",
    "python benchmarks/dropped_in.py": "half a minute; tests/docs has it",
    "python benchmarks/gradient_agreement.py": "minutes",
    "python benchmarks/guidance_gradient.py": "minutes",
    "python benchmarks/gradient_accumulation.py": "a minute",
    "python benchmarks/host_adamw.py": "needs what a C++ compiler builds",
    "python benchmarks/without_native.py": "so does this",
    "python benchmarks/call_overhead.py": "a minute",
    "python benchmarks/patched_iteration.py": "minutes; tests/benchmarks has it",
}
FILES = {
    "prompts.txt": "a red circle\ntwo crosses\n",
    "prompts.jsonl": '{"prompt": "a red circle"}\n{"prompt": "a green square"}\n',
    "grey.py": "\n".join(blocks("docs/watch.md", "python")),
    "pick_prompts.py": blocks("docs/flux.md", "python")[0],
    "hpdv2/train.json": json.dumps([{"prompt": f"{number} cats"} for number in (*range(20), *range(20))]),
}
"""What the pages take for granted in the current folder."""


class Parsed(Exception):
    """A program understood its arguments."""


def shown(command: Command) -> str:
    return f"{command.page}: {' '.join(command.text.split())}"[:90]


def runs(command: Command) -> bool:
    if command.program == "leapalign" and len(command.words()) == 2 and command.words()[1] not in ("demo", "doctor"):
        return False  # the mere name of a command
    return not any(" ".join(command.words()).startswith(words) for words in PARSED_ONLY)


def stand_in(command: Command) -> list[str]:
    text = command.text
    for given, instead in {**PAGE_STAND_INS.get(command.page, {}), **STAND_INS}.items():
        text = text.replace(given, instead)
    return Command(command.page, text).words()


@pytest.mark.parametrize("command", COMMANDS, ids=shown)
def test_a_command_is_understood(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the program's own parser, in the checkout's own configs; overrides are checked."""
    assert command.program in PROGRAMS
    words = stand_in(command)
    words = words[words.index(command.program) : words.index(">") if ">" in words else None]
    monkeypatch.chdir(ROOT)
    if words[0] == "make":
        subprocess.run(["make", "-n", *words[1:]], check=True, capture_output=True)
    elif words[0] == "leapalign":
        leapalign_understands(words[1:], monkeypatch)
    elif words[:3] == ["python", "-m", "leap_kernels"]:
        understands(lambda: leap_kernels_main(words[3:]), monkeypatch)
    elif words[1].startswith("benchmarks/"):
        if "argparse" in Path(words[1]).read_text():
            monkeypatch.setattr(sys, "argv", words[1:])
            understands(lambda: runpy.run_path(words[1], run_name="__main__"), monkeypatch)
        else:
            assert words[2:] == []
    elif words[:3] == ["python", "-m", "pytest"]:
        assert all(Path(word).exists() for word in words[3:] if word.startswith("tests"))


def understands(program: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends where it has parsed its arguments; what it leaves to others are overrides."""
    parse = argparse.ArgumentParser.parse_known_args

    def parse_and_end(*arguments: Any, **options: Any) -> None:
        raise Parsed(parse(*arguments, **options)[1])

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_and_end)
    with pytest.raises(Parsed) as end:
        program()
    assert all("=" in item and not item.startswith("-") for item in end.value.args[0])


def leapalign_understands(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if words[0] == "kernels":
        understands(lambda: leap_kernels_main(words[1:]), monkeypatch)
    elif len(words) == 1 and words[0] != "doctor":
        with pytest.raises(SystemExit) as end:
            build_parser().parse_args([*words, "--help"])
        assert end.value.code == 0
    else:
        given, overrides = build_parser().parse_known_args(words)
        assert all("=" in item and not item.startswith("-") for item in overrides)
        if getattr(given, "config", None):
            load_config(given.config, overrides)


@pytest.fixture(scope="session")
def python(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Path:
    """The Python of an environment with the wheel, and what it needs from here: not this checkout."""
    python = bare_python(tmp_path_factory.mktemp("installed"))
    install(python, wheel)
    return python


def tiny(values: dict[str, Any]) -> dict[str, Any]:
    """A config in little: method, optimizer and memory as they are."""
    asked = values["train"]
    micro = min(asked.get("microbatch", 2), TINY["rollout"]["batch_size"])
    small = {
        "prompts": {**values.get("prompts", {}), **TINY["prompts"]},
        "train": {**asked, **TINY["train"], "microbatch": micro},
    }
    if "watch" in values:
        small["watch"] = {
            **values["watch"],
            "rewards": [{"name": "clipscore", "path": "embedded:reward"}],
            "stop_when": [],
        }
    return {**values, **TINY, **small}


@pytest.fixture(scope="session")
def outcomes(python: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Command, str | None]:
    """What became of each command that is run: None, or what went wrong."""
    folder = tmp_path_factory.mktemp("empty")
    for name, text in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    for name in ("benchmarks", "docs"):
        shutil.copytree(ROOT / name, folder / name)
    (folder / "kernels").mkdir()
    shutil.copy(ROOT / "kernels" / "README.md", folder / "kernels")
    for path in (ROOT / "configs").rglob("*.yaml"):
        copy = folder / "configs" / path.relative_to(ROOT / "configs")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(yaml.safe_dump(tiny(yaml.safe_load(path.read_text()))))
    asked = list(filter(runs, COMMANDS))
    (folder / "commands.json").write_text(json.dumps([stand_in(command) for command in asked]))
    script = ROOT / "tests" / "support" / "run_commands.py"
    done = subprocess.run(
        [python, script, "commands.json", "outcomes.json"],
        cwd=folder,
        umask=0o077,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(asked, json.loads((folder / "outcomes.json").read_text()), strict=True))


@pytest.mark.slow
@pytest.mark.wheel
@pytest.mark.data
@pytest.mark.hub
@pytest.mark.parametrize("command", [command for command in COMMANDS if runs(command)], ids=shown)
def test_a_command_runs(command: Command, outcomes: dict[Command, str | None]) -> None:
    assert outcomes[command] is None, outcomes[command]


@pytest.mark.slow
@pytest.mark.wheel
def test_what_ran_is_the_wheel(python: Path, tmp_path: Path) -> None:
    """Its script too."""
    asked = "import leapalign, leap_kernels; print(leapalign.__file__); print(leap_kernels.__file__)"
    done = subprocess.run([python, "-c", asked], cwd=tmp_path, check=True, capture_output=True, text=True)
    places = [Path(line) for line in done.stdout.splitlines()]
    assert all(place.is_relative_to(python.parents[1]) for place in places)
    done = subprocess.run([python.parent / "leapalign", "--help"], check=True, capture_output=True, text=True)
    assert "usage: leapalign" in done.stdout


def test_every_exception_is_of_some_command() -> None:
    """No command that is gone keeps its line."""
    texts = {command.page: " ".join(" ".join(c.text.split()) for c in commands(command.page)) for command in COMMANDS}
    everything = " ".join(texts.values())
    assert all(words in everything for words in (*STAND_INS, *PARSED_ONLY))
    assert all(words in texts[page] for page, words in ((p, w) for p, many in PAGE_STAND_INS.items() for w in many))
