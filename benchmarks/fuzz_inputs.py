"""Mutated configs, overrides and prompt files, through what the command line does with them.

    python benchmarks/fuzz_inputs.py --cases 100000 --seed 0
    python benchmarks/fuzz_inputs.py --only 1234 --seed 0          # one case again, with its traceback

Each case must end in a second of the processor's, accepted or as a UserError of one line. An accepted config of the
embedded model is trained for an iteration where that is small enough, every ``--run-every``-th time. Loaded parts are
kept between cases. Ends with 1 where a case fails.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import dataclasses
import functools
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # A script finds the modules of its own folder alone.

from benchmarks import mutations
from leapalign import models, rewards
from leapalign.cli.libraries import quiet_libraries
from leapalign.config import Config, load_config
from leapalign.inputs.validation import UserError
from leapalign.models.folder import ModelFolder
from leapalign.prompts.files import read_prompts
from leapalign.runs.opening import refuse_used_folder
from leapalign.runs.run import Run
from leapalign.trainer import Trainer

CASE_SECONDS, RUN_SECONDS = 1.0, 60.0
WAITING = 20
"""On a busy machine the clock runs so many times as fast, but not for what waits for a network."""
MEMORY = 12 * 2**30
"""Address space of the process: what asks for more fails, before the machine does."""
LONGEST = 10_000
"""Characters in a message: it may name a path or two of 4,096."""
SMALL = 64
"""Images times steps of an iteration that is run."""


class Overdue(BaseException):
    """A case took too long; no ``except Exception`` may swallow it."""


@dataclass
class Tally:
    """What became of the cases so far."""

    outcomes: collections.Counter[str] = field(default_factory=collections.Counter)
    failures: list[str] = field(default_factory=list)
    slowest: tuple[float, str] = (0.0, "")

    def fail(self, number: int, why: str) -> None:
        self.failures.append(f"case {number}: {why}")
        tqdm.write(self.failures[-1], file=sys.stderr)


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raises `Overdue` in the block after so many seconds of the processor, or `WAITING` times as many on the clock."""

    def overdue(*_: Any) -> None:
        raise Overdue(f"longer than {seconds:g} s")

    before = [signal.signal(number, overdue) for number in (signal.SIGPROF, signal.SIGALRM)]
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, WAITING * seconds)
    try:
        yield
    finally:
        for timer in (signal.ITIMER_PROF, signal.ITIMER_REAL):
            signal.setitimer(timer, 0)
        for number, handler in zip((signal.SIGPROF, signal.SIGALRM), before, strict=True):
            signal.signal(number, handler)


@contextlib.contextmanager
def current_folder(folder: Path) -> Iterator[Path]:
    """Within the block it is ``folder``: runs that lie in the caller's are not those of the cases."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield folder
    finally:
        os.chdir(before)


@contextlib.contextmanager
def kept_parts() -> Iterator[None]:
    """Within the block a model's part, a reward and the embeddings of prompts are loaded once each, and copied."""
    part, encoded, load = ModelFolder.part, models._encoded, rewards.get_reward

    def once(function: Callable[..., Any], duplicate: Callable[[Any], Any]) -> Callable[..., Any]:
        known: dict[str, Any] = {}

        def call(*arguments: Any, **options: Any) -> Any:
            shown = [vars(one) if isinstance(one, ModelFolder) else one for one in arguments]
            key = repr((shown, sorted(options.items(), key=repr)))
            if key not in known:
                known[key] = function(*arguments, **options)
            return duplicate(known[key])

        return call

    unchanged: Callable[[Any], Any] = lambda found: found  # noqa: E731 -- as short as its use
    get_reward = once(load, unchanged)
    with (
        patch.object(ModelFolder, "part", once(part, copy.deepcopy)),
        patch.object(models, "_encoded", once(encoded, unchanged)),
        patch("huggingface_hub.constants.HF_HUB_OFFLINE", True),  # a hub id is no reason to wait for a network
        patch.object(models, "require_compiler", unchanged),  # takes seconds, whatever the config
        patch("leapalign.trainer.reward_terms", functools.partial(rewards.reward_terms, make=get_reward)),
    ):
        yield


def checked(config: Config) -> Trainer | None:
    """What ``leapalign train`` checks before it begins."""
    refuse_used_folder(Path(config.output))
    return Trainer.from_config(config)


def config_case(rng: Random, folder: Path) -> Config:
    path = folder / "config.yaml"
    path.write_bytes(mutations.config_text(rng))
    return load_config(path)


def override_case(rng: Random, folder: Path) -> Config:
    path = folder / "config.yaml"
    path.write_bytes(mutations.unchanged(rng))
    return load_config(path, mutations.assignments(rng))


def prompt_case(rng: Random, folder: Path) -> None:
    suffix, content = mutations.prompt_file(rng)
    path = folder / f"prompts{suffix}"
    path.write_bytes(content)
    for prompt in read_prompts(path):
        assert prompt.strip() == prompt
        assert prompt.encode()


CASES: dict[str, Callable[[Random, Path], Config | None]] = {
    "config": config_case,
    "overrides": override_case,
    "prompts": prompt_case,
}


def can_run(config: Config) -> bool:
    """Whether an iteration takes a moment."""
    images = config.train.batch_size * config.train.leaps_per_rollout * (2 if config.model.true_cfg_scale != 1 else 1)
    copies, pixels = config.method.get("copies", 1) or 1, config.model.height * config.model.width
    work = images * config.rollout.num_steps * copies * pixels / 32**2
    return work <= SMALL and not config.model.compile and config.samples.count <= 24


def run(config: Config, folder: Path) -> None:
    """One iteration, with all that a run writes."""
    train = dataclasses.replace(config.train, iterations=1)
    config = dataclasses.replace(config, train=train, output=str(folder / "run"))
    with contextlib.redirect_stderr(Path(os.devnull).open("w")):
        Run.from_config(config).train()


def one_case(seed: int, number: int, folder: Path, should_run: Callable[[], bool], tally: Tally) -> None:
    rng = Random(f"{seed} {number}")
    kind = rng.choice(list(CASES))
    started = time.process_time()
    try:
        config = CASES[kind](rng, folder)
        if config is not None:
            checked(config)
    except UserError as error:
        tally.outcomes[f"{kind} refused"] += 1
        if "\n" in str(error) or not str(error).isprintable() or len(str(error)) > LONGEST:
            raise AssertionError(f"not one line: {str(error)[:300]!r}") from None
        return
    finally:
        tally.slowest = max(tally.slowest, (time.process_time() - started, f"case {number}"))
    tally.outcomes[f"{kind} accepted"] += 1
    if config is not None and can_run(config) and should_run():
        signal.setitimer(signal.ITIMER_PROF, RUN_SECONDS)
        signal.setitimer(signal.ITIMER_REAL, WAITING * RUN_SECONDS)
        tally.outcomes["run"] += 1
        try:
            run(config, folder)
        except UserError:
            tally.outcomes["ended in a run by a UserError"] += 1


def fuzz(cases: range, seed: int, run_every: int) -> Tally:
    """Runs ``cases``; each is a function of ``seed`` and its number."""
    tally, runnable = Tally(), 0

    def should_run() -> bool:
        nonlocal runnable
        runnable += 1
        return runnable % run_every == 0

    with tempfile.TemporaryDirectory() as name, current_folder(Path(name)) as folder, kept_parts():
        checked(load_config(Path("tiny")))  # What loads at first use is no case's fault.
        for number in tqdm(cases, desc="cases", disable=None):
            try:
                with within(CASE_SECONDS):
                    one_case(seed, number, folder, should_run, tally)
            except Overdue as error:
                tally.fail(number, str(error))
            except Exception as error:
                if len(cases) == 1:
                    traceback.print_exc()
                tally.fail(number, f"{type(error).__name__}: {str(error)[:200]}")
            shutil.rmtree(folder / "run", ignore_errors=True)
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run-every", type=int, default=1, help="of the accepted configs that are small")
    parser.add_argument("--only", type=int, help="the number of one case")
    arguments = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(1)
    import resource  # which Windows has not

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    cases = range(arguments.cases) if arguments.only is None else range(arguments.only, arguments.only + 1)
    started = time.perf_counter()
    tally = fuzz(cases, arguments.seed, arguments.run_every)
    print(f"{len(cases):,} cases in {time.perf_counter() - started:.0f} s")
    for outcome, count in sorted(tally.outcomes.items()):
        print(f"{count:8,} {outcome}")
    print(f"slowest check {tally.slowest[0]:.2f} s ({tally.slowest[1]}); {len(tally.failures)} failures")
    return 1 if tally.failures else 0


if __name__ == "__main__":
    sys.exit(main())
