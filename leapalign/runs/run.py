"""One training run on disk: what it records, shows, measures and saves as it goes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from leapalign.config import Config, save_config
from leapalign.evaluation.generate import generate
from leapalign.inputs.prompt_limits import warn_of_cut
from leapalign.inputs.validation import UserError
from leapalign.planning.shortage import shortage_explained
from leapalign.prompts.embeddings import embeddings_of
from leapalign.reports.pictures import image_grid
from leapalign.runs.checkpoint import latest_checkpoint, load_checkpoint, remove_partial, save_checkpoint
from leapalign.runs.run_folder import MetricsLog
from leapalign.storage.durable import beside, make_folder, writing
from leapalign.storage.faults import point
from leapalign.trainer import Trainer
from leapalign.watch.metrics import shown
from leapalign.watch.records import ranked
from leapalign.watch.watch import Watch

SHOWN = ("reward", "loss", "grad_norm", "d_j", "d_end")
SAMPLE_SEED = 2_000_000


@dataclass
class Run:
    """A trainer and the folder ``config.output`` that holds what comes of it; ``watch`` measures held-out prompts."""

    trainer: Trainer
    watch: Watch | None = None

    @classmethod
    def from_config(cls, config: Config) -> Run:
        """Reads and checks every file the config names. Raises UserError before any long work."""
        watch = Watch.from_config(config)
        trainer = Trainer.from_config(config)
        if watch:
            watch.warn_of_trained(trainer.prompts)
            rewards = [*((term.name, term.reward) for term in trainer.rewards), *watch.rewards.items()]
            warn_of_cut([(f"reward {name}", one) for name, one in rewards], lambda: watch.prompts, "watch.prompts")
            watch.embeddings = embeddings_of(config, watch.prompts, "watch.prompts")
        return cls(trainer, watch)

    @property
    def config(self) -> Config:
        return self.trainer.config

    @property
    def folder(self) -> Path:
        return Path(self.config.output)

    def resume(self) -> None:
        """Continues after the latest checkpoint; from the start where there is none. Raises UserError."""
        with writing(self.folder):
            remove_partial(self.folder)
        checkpoint = latest_checkpoint(self.folder)
        if checkpoint is not None:
            trainer = self.trainer
            trainer.iteration = load_checkpoint(checkpoint, trainer.model.transformer, trainer.optimizer)
            if self.watch:
                self.watch.recall(trainer.iteration)

    def train(self, stopping: Callable[[], bool] = lambda: False) -> float:
        """Trains to the end, or until ``stopping()`` or a rule of the watch holds, recording all in the folder.

        Returns the seconds spent in iterations. Raises UserError where the folder cannot be written, or a rule holds
        before training.
        """
        config, trainer = self.config, self.trainer
        with writing(self.folder):
            make_folder(self.folder)
        save_config(config, self.folder / "config.yaml")
        seconds = 0.0
        bar = tqdm(total=config.train.iterations, initial=trainer.iteration, desc="train", unit="it")
        with MetricsLog(self.folder, trainer.iteration) as log, bar, shortage_explained(trainer):
            if trainer.iteration == 0:
                self._save_samples()
                self._measure(log)
            if self._stopped:
                return seconds
            for record in trainer.run():
                log.write(record)
                log.write_incidents(trainer.incidents)
                seconds += record["seconds"]
                values = {name: f"{record[name]:.3g}" for name in SHOWN if name in record}
                bar.set_postfix({**values, "s/it": f"{record['seconds']:.2f}"})
                bar.update()
                last = trainer.iteration == config.train.iterations
                if last or trainer.iteration % config.samples.every == 0:
                    self._save_samples()
                if self.watch and self.watch.due(trainer.iteration):
                    self._measure(log)
                ending = stopping() or self._stopped
                # Last: a resumed run goes on after its checkpoint, so all else must be on the disk before.
                if last or ending or trainer.iteration % config.checkpoint.every == 0:
                    self._save_checkpoint()
                if ending:
                    break
        return seconds

    def _measure(self, log: MetricsLog) -> None:
        """Records and shows what the watch sees, if there is one. Raises UserError where a rule holds at the base."""
        watch, trainer = self.watch, self.trainer
        if watch is None:
            return
        with trainer.optimizer.averaged_weights():
            record = watch.look(trainer.iteration, trainer.model, trainer.rewards)
        log.write_watch(record)
        tqdm.write(shown(record, watch.base or {}), file=sys.stderr)
        if watch.stop and trainer.iteration == 0:
            raise UserError(
                f"{watch.stop}, before any training; correct this rule, then continue with --resume {self.folder}"
            )

    @property
    def _stopped(self) -> bool:
        """Whether a rule held at the last measurement; so it did where an earlier process left it at that."""
        return self.watch is not None and self.watch.stop is not None

    def _save_samples(self) -> None:
        """A grid of images by the weight average for the run's first prompts, the same seeds every time."""
        config, trainer = self.config, self.trainer
        count = min(config.samples.count, len(trainer.prompts))
        with trainer.optimizer.averaged_weights():
            images = generate(
                trainer.model,
                trainer.embeddings[torch.arange(count)],
                range(SAMPLE_SEED, SAMPLE_SEED + count),
                config.rollout.num_steps,
                config.rollout.batch_size,
            )
        folder = self.folder / "samples"
        with writing(folder):
            make_folder(folder)
        with beside(folder / f"step-{trainer.iteration}.png") as picture:
            image_grid(images, trainer.prompts[:count]).save(picture, format="PNG")
            point("samples")

    def _save_checkpoint(self) -> None:
        config, trainer = self.config, self.trainer
        trainer.refuse_bad_weights()
        best_first = ranked(self.folder, config.watch.best_by)
        keep = config.checkpoint.keep
        save_checkpoint(self.folder, trainer.iteration, trainer.model.transformer, trainer.optimizer, keep, best_first)
