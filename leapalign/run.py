"""One training run on disk: its folder, progress bar, metrics and sample grids."""

from __future__ import annotations

from pathlib import Path

import torch
from tqdm import tqdm

from leapalign.checkpoint import latest_checkpoint
from leapalign.config import save_config
from leapalign.generate import generate
from leapalign.pictures import image_grid
from leapalign.run_folder import METRICS, MetricsLog
from leapalign.trainer import Trainer
from leapalign.validation import UserError

SHOWN = ("reward", "loss", "grad_norm", "d_j", "d_end")
SAMPLE_SEED = 2_000_000


def refuse_used_folder(run: Path) -> None:
    """Raises UserError where ``run`` already holds a run."""
    if (run / METRICS).exists() or (run / "checkpoints").exists():
        raise UserError(f"'{run}' already holds a run; continue it with --resume {run} or choose another output")


def unused_folder(run: Path) -> Path:
    """``run``, or the first of ``run-2``, ``run-3``, ... that holds nothing yet."""
    candidate, number = run, 2
    while candidate.exists():
        candidate, number = run.with_name(f"{run.name}-{number}"), number + 1
    return candidate


def run_training(trainer: Trainer) -> float:
    """Trains to the end, recording everything in ``config.output``; returns the seconds spent in iterations."""
    config, run = trainer.config, Path(trainer.config.output)
    run.mkdir(parents=True, exist_ok=True)
    save_config(config, run / "config.yaml")
    seconds = 0.0
    bar = tqdm(total=config.train.iterations, initial=trainer.iteration, desc="train", unit="it")
    with MetricsLog(run, trainer.iteration) as log, bar:
        if trainer.iteration == 0:
            save_samples(trainer)
        for record in trainer.run():
            log.write(record)
            seconds += record["seconds"]
            shown = {name: f"{record[name]:.3g}" for name in SHOWN if name in record}
            bar.set_postfix({**shown, "s/it": f"{record['seconds']:.2f}"})
            bar.update()
            if trainer.iteration % config.samples.every == 0 or trainer.iteration == config.train.iterations:
                save_samples(trainer)
    return seconds


def save_samples(trainer: Trainer) -> None:
    """A grid of images by the weight average for the run's first prompts, the same seeds every time."""
    config = trainer.config
    count = min(config.samples.count, len(trainer.prompts))
    with trainer.optimizer.averaged_weights():
        images = generate(
            trainer.model,
            trainer.embeddings[torch.arange(count)],
            range(SAMPLE_SEED, SAMPLE_SEED + count),
            config.rollout.num_steps,
            config.rollout.batch_size,
        )
    folder = Path(config.output) / "samples"
    folder.mkdir(exist_ok=True)
    image_grid(images, trainer.prompts[:count]).save(folder / f"step-{trainer.iteration}.png")


def prepare_resume(trainer: Trainer) -> None:
    """Continues the run in ``config.output`` after its latest checkpoint; from the start where there is none."""
    checkpoint = latest_checkpoint(Path(trainer.config.output))
    if checkpoint is not None:
        trainer.resume(checkpoint)
