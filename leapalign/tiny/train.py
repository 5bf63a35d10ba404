"""``make tiny``: trains all of the tiny world from seeds, and writes the shipped weights.

The autoencoder and the text encoders come first; then the base model, and beside it the reward that runs optimise;
last the critic, which learns from pictures of the base. The log of the run that made the shipped weights lies beside
them, in ``training.log``. What is finished waits in ``WORK``: a run that was stopped goes on with the next part.
"""

from __future__ import annotations

import multiprocessing
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from leapalign.models.flux import FluxModel
from leapalign.storage.embedded import FOLDER
from leapalign.tiny.judged_pool import build_pool
from leapalign.tiny.model import build_scheduler, build_transformer
from leapalign.tiny.train_autoencoder import train_autoencoder
from leapalign.tiny.train_base import STAGES, train_base
from leapalign.tiny.train_critic import train_critic
from leapalign.tiny.train_reward import train_reward
from leapalign.tiny.train_text_encoders import train_text_encoders
from leapalign.tiny.world import IMAGE_SIZE, training_prompts, watched_prompts

# Images generated at each stage of the base's training; most by the last, which is where runs start from.
IMAGES_PER_STAGE = (1000, 1500, 2000, 4000)
SEED = 0
WORK = Path("runs/make_tiny")


@dataclass(frozen=True)
class Log:
    """Prints each line and appends it to a file, from whichever process."""

    path: Path
    started: float = field(default_factory=time.time)

    def __call__(self, part: str, line: str) -> None:
        line = f"{time.time() - self.started:6.0f}s  {part} {line}"
        print(line, flush=True)
        with self.path.open("a") as file:
            file.write(line + "\n")


@dataclass(frozen=True)
class Parts:
    """What is trained, in ``folder``, until all of it is there."""

    folder: Path
    log: Log

    def once(self, part: str, train: Callable[[], None]) -> None:
        """Trains ``part``, unless that has been finished."""
        finished = self.folder / f"{part}.finished"
        if not finished.exists():
            train()
            finished.touch()

    def autoencoder(self) -> AutoencoderKL:
        return AutoencoderKL.from_pretrained(self.folder / "base" / "vae").requires_grad_(False)

    def train_autoencoder(self) -> None:
        train_autoencoder(self.folder / "base" / "vae", SEED, partial(self.log, "autoencoder"))

    def train_base(self) -> None:
        text = train_text_encoders(SEED, partial(self.log, "text encoders"))
        base, stages = self.folder / "base", self.folder / "stages"
        train_base(self.autoencoder(), text, base, stages, SEED, partial(self.log, "base"))

    def train_reward(self) -> None:
        # Of the model nothing but the decoder is used.
        model = FluxModel(build_transformer(), build_scheduler(), IMAGE_SIZE, IMAGE_SIZE, self.autoencoder())
        train_reward(model, self.folder / "reward", SEED + 1, partial(self.log, "reward"))

    def train_critic(self) -> None:
        folders = [self.folder / "stages" / f"step-{step}" for step in STAGES]
        pool = build_pool(list(zip(folders, IMAGES_PER_STAGE, strict=True)), SEED + 2)
        share = pool.own_satisfied().float().mean().item()
        self.log("critic", f"{len(pool)} images, {share:.3f} of them satisfy their prompt")
        train_critic(pool, self.folder / "critic", SEED + 2, partial(self.log, "critic"))


def main() -> None:
    WORK.mkdir(parents=True, exist_ok=True)
    parts = Parts(WORK, Log(WORK / "training.log"))
    parts.once("autoencoder", parts.train_autoencoder)
    # Small tensors gain nothing from a second thread: a core for each.
    spawning = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, spawning, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        work = {"base": parts.train_base, "reward": parts.train_reward}
        for job in [pool.submit(parts.once, part, train) for part, train in work.items()]:
            job.result()
    parts.once("critic", parts.train_critic)
    for name, prompts in (("training_prompts", training_prompts()), ("watch_prompts", watched_prompts())):
        (WORK / f"{name}.txt").write_text("".join(f"{prompt.text}\n" for prompt in prompts))
    shutil.rmtree(FOLDER)
    shutil.copytree(WORK, FOLDER, ignore=shutil.ignore_patterns("stages", "*.finished"))
    shutil.rmtree(WORK)


if __name__ == "__main__":
    main()
