"""One training run on disk: its folder, progress bar, metrics and sample grids."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from leapalign.checkpoint import latest_checkpoint, remove_partial
from leapalign.config import Config, save_config
from leapalign.durable import beside, make_folder, writing
from leapalign.faults import point
from leapalign.generate import generate
from leapalign.memory.shortage import shortage_explained
from leapalign.pictures import image_grid
from leapalign.run_folder import METRICS, MetricsLog
from leapalign.run_lock import run_lock
from leapalign.trainer import Trainer
from leapalign.validation import UserError
from leapalign.watch.metrics import shown
from leapalign.watch.watch import Watch

SHOWN = ("reward", "loss", "grad_norm", "d_j", "d_end")
SAMPLE_SEED = 2_000_000


def refuse_used_folder(run: Path) -> None:
    """Raises UserError where ``run`` already holds a run, or can be no folder."""
    with writing(run):
        used = (run / METRICS).exists() or (run / "checkpoints").exists()
    if used:
        raise UserError(f"'{run}' already holds a run; continue it with --resume {run} or choose another output")


def unused_folder(run: Path) -> Path:
    """``run``, or the first of ``run-2``, ``run-3``, ... that holds nothing yet."""
    candidate, number = run, 2
    while candidate.exists():
        candidate, number = run.with_name(f"{run.name}-{number}"), number + 1
    return candidate


@contextlib.contextmanager
def opened_run(config: Config, resume: bool) -> Iterator[Trainer]:
    """The trainer for ``config.output``, at its latest checkpoint if ``resume``; no other process can have it, too.

    Raises UserError for a bad config, before anything is written, and for a folder that is used or in use.
    """
    run = Path(config.output)
    with contextlib.ExitStack() as held:
        if resume:
            # At once: a second model in memory could end the first process.
            held.enter_context(run_lock(run))
            trainer = Trainer.from_config(config)
            prepare_resume(trainer)
        else:
            refuse_used_folder(run)
            trainer = Trainer.from_config(config)
            with writing(run):
                make_folder(run)
            held.enter_context(run_lock(run))
            refuse_used_folder(run)
        yield trainer


def run_training(trainer: Trainer, stopping: Callable[[], bool] = lambda: False) -> float:
    """Trains to the end, or until ``stopping()`` or a rule of the watch holds, recording all in ``config.output``.

    Returns the seconds spent in iterations. Raises UserError where the folder cannot be written, or a rule holds
    before training.
    """
    config, run, watch = trainer.config, Path(trainer.config.output), trainer.watch
    with writing(run):
        make_folder(run)
    save_config(config, run / "config.yaml")
    seconds = 0.0
    bar = tqdm(total=config.train.iterations, initial=trainer.iteration, desc="train", unit="it")
    with MetricsLog(run, trainer.iteration) as log, bar, shortage_explained(trainer):
        if trainer.iteration == 0:
            save_samples(trainer)
            if watch:
                measure(watch, trainer, log)
        if stopped(watch):
            return seconds
        for record in trainer.run(lambda: stopping() or stopped(watch)):
            log.write(record)
            log.write_incidents(trainer.incidents)
            seconds += record["seconds"]
            values = {name: f"{record[name]:.3g}" for name in SHOWN if name in record}
            bar.set_postfix({**values, "s/it": f"{record['seconds']:.2f}"})
            bar.update()
            if trainer.iteration % config.samples.every == 0 or trainer.iteration == config.train.iterations:
                save_samples(trainer)
            if watch and watch.due(trainer.iteration):
                measure(watch, trainer, log)
    return seconds


def measure(watch: Watch, trainer: Trainer, log: MetricsLog) -> None:
    """Measures, records and shows what ``watch`` sees. Raises UserError where a rule holds before training."""
    record = watch.look(trainer)
    log.write_watch(record)
    tqdm.write(shown(record, watch.base or {}), file=sys.stderr)
    if watch.stop and trainer.iteration == 0:
        output = trainer.config.output
        raise UserError(f"{watch.stop}, before any training; correct this rule, then continue with --resume {output}")


def stopped(watch: Watch | None) -> bool:
    """Whether a rule held at the last measurement; so it did where an earlier process left it at that."""
    return watch is not None and watch.stop is not None


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
    with writing(folder):
        make_folder(folder)
    with beside(folder / f"step-{trainer.iteration}.png") as picture:
        image_grid(images, trainer.prompts[:count]).save(picture, format="PNG")
        point("samples")


def prepare_resume(trainer: Trainer) -> None:
    """Continues the run in ``config.output`` after its latest checkpoint; from the start where there is none."""
    run = Path(trainer.config.output)
    with writing(run):
        remove_partial(run)
    checkpoint = latest_checkpoint(run)
    if checkpoint is not None:
        trainer.resume(checkpoint)
        if trainer.watch:
            trainer.watch.recall(trainer.iteration)
