"""``make tiny``: trains the base model and both rewards of the tiny world from seeds, and writes the shipped weights.

The log of the run that made the shipped weights lies beside them, in ``training.log``.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from leapalign.storage.embedded import FOLDER
from leapalign.tiny.judged_pool import build_pool
from leapalign.tiny.train_base import STAGES, train_base
from leapalign.tiny.train_critic import train_critic
from leapalign.tiny.train_reward import train_reward
from leapalign.tiny.world import training_prompts

# Images generated at each stage of the base's training; most by the last, nearest to what runs start from.
IMAGES_PER_STAGE = (1000, 1500, 2000, 4000)
SEED = 0


class Log:
    """Prints each line and keeps it in a file."""

    def __init__(self, path: Path) -> None:
        self._path, self._started = path, time.monotonic()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")

    def prefixed(self, name: str) -> Callable[[str], None]:
        return lambda line: self(f"{name} {line}")

    def __call__(self, line: str) -> None:
        line = f"{time.monotonic() - self._started:6.0f}s  {line}"
        print(line, flush=True)
        with self._path.open("a") as file:
            file.write(line + "\n")


def main() -> None:
    log = Log(FOLDER / "training.log")
    (FOLDER / "training_prompts.txt").write_text("".join(f"{prompt.text}\n" for prompt in training_prompts()))
    with tempfile.TemporaryDirectory() as stages:
        train_base(FOLDER / "base", Path(stages), SEED, log)
        folders = [Path(stages) / f"step-{step}" for step in STAGES]
        work = list(zip(folders, IMAGES_PER_STAGE, strict=True))
        for name, train, seed in (("reward", train_reward, SEED + 1), ("critic", train_critic, SEED + 2)):
            pool = build_pool(work, seed)
            share = (pool.own_edits() == 0).float().mean().item()
            log(f"{name}: {len(pool)} images, {share:.3f} of them satisfy their prompt")
            train(pool, FOLDER / name, seed, log.prefixed(name))


if __name__ == "__main__":
    main()
