"""One training run on disk: what it records, shows, measures and saves as it goes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leapalign.config import Config, save_config
from leapalign.inputs.prompt_limits import warn_of_cut
from leapalign.inputs.validation import UserError
from leapalign.memory.residency import Stage, stage, watched
from leapalign.parallel import processes
from leapalign.planning.shortage import shortage_explained
from leapalign.prompts.embeddings import embeddings_of
from leapalign.reports.pictures import image_grid
from leapalign.reports.progress import progress, say
from leapalign.runs.checkpoint import (
    checkpoints_of,
    load_checkpoint,
    remove_partial,
    require_space_for_all,
    save_checkpoint,
)
from leapalign.runs.history import note_settings, recorded
from leapalign.runs.run_folder import MetricsLog, NoLog, later_samples
from leapalign.runs.setting_aside import set_aside
from leapalign.storage.durable import beside, make_folder, writing
from leapalign.storage.faults import point
from leapalign.trainer import Trainer
from leapalign.watch.metrics import shown
from leapalign.watch.records import ranked
from leapalign.watch.watch import Watch

SHOWN = ("reward", "loss", "grad_norm", "d_j", "d_end")
LOGGED_EVERY = 60.0
"""Seconds between lines where there is no terminal for a bar."""


@dataclass
class Run:
    """A trainer and the folder ``config.output`` that holds what comes of it; ``watch`` measures held-out prompts."""

    trainer: Trainer
    watch: Watch | None = None

    @classmethod
    def from_config(cls, config: Config, checkpoint: Path | None = None) -> Run:
        """Reads and checks every file the config names, and the room on the disk; continues after ``checkpoint``.

        Raises UserError before any long work, and writes nothing.
        """
        watch = Watch.from_config(config)
        trainer = Trainer.unencoded(config)
        run = cls(trainer, watch)
        if watch:
            watch.warn_of_trained(trainer.prompts)
            rewards = [*((term.name, term.reward) for term in trainer.rewards), *watch.rewards.items()]
            warn_of_cut([(f"reward {name}", one) for name, one in rewards], lambda: watch.prompts, "watch.prompts")
        if checkpoint is not None:
            trainer.iteration = load_checkpoint(checkpoint, trainer.model.transformer, trainer.optimizer)
            if watch:
                watch.recall(trainer.iteration)
        run._require_space()
        trainer.encode()
        if watch:
            watch.embeddings = embeddings_of(config, watch.prompts, "watch.prompts")
        return run

    @property
    def config(self) -> Config:
        return self.trainer.config

    @property
    def folder(self) -> Path:
        return Path(self.config.output)

    def train(self, stopping: Callable[[], bool] = lambda: False) -> float:
        """Trains to the end, or until ``stopping()`` or a rule of the watch holds, recording all in the folder.

        Returns the seconds spent in iterations. Raises UserError where the folder cannot be written, or a rule holds
        before training.
        """
        config, trainer = self.config, self.trainer
        processes.wait()  # until all have read what is there
        if processes.first():
            self._prepare_folder()
        log_of = MetricsLog if processes.first() else NoLog
        seconds, told = 0.0, time.monotonic()
        with (
            log_of(self.folder, trainer.iteration) as log,
            progress("train", config.train.iterations, "it", trainer.iteration) as bar,
            shortage_explained(trainer),
            watched(self._shown_on(bar)),
        ):
            if trainer.iteration == 0 and config.samples.every:
                self._save_samples()
            if trainer.iteration == 0:
                self._measure(log)
            if self._stopped:
                return seconds
            for record in trainer.run():
                log.write(record)
                log.write_incidents(trainer.incidents)
                seconds += record["seconds"]
                values = {name: f"{record[name]:.3g}" for name in SHOWN if name in record}
                if "device_reserved_bytes" in record:
                    values["GiB"] = f"{record['device_reserved_bytes'] / 2**30:.1f}"
                bar.set_postfix({**values, "s/it": f"{record['seconds']:.2f}"})
                bar.update()
                last = trainer.iteration == config.train.iterations
                if bar.disable and (last or time.monotonic() - told >= LOGGED_EVERY):
                    told = time.monotonic()
                    figures = ", ".join(f"{name} {value}" for name, value in values.items())
                    say(f"iteration {trainer.iteration} of {config.train.iterations}: {figures}")
                if config.samples.every and (last or trainer.iteration % config.samples.every == 0):
                    self._save_samples()
                if self.watch and self.watch.due(trainer.iteration):
                    self._measure(log)
                ending = processes.any_of(stopping() or self._stopped)
                # Last: a resumed run goes on after its checkpoint, so all else must be on the disk before.
                if last or ending or trainer.iteration % config.checkpoint.every == 0:
                    self._save_checkpoint()
                if ending:
                    break
        return seconds

    def _prepare_folder(self) -> None:
        """Leaves in the folder what led to this iteration, and the settings of those that follow."""
        iteration = self.trainer.iteration
        with writing(self.folder):
            make_folder(self.folder)
            remove_partial(self.folder)
        if any(number > iteration for number in checkpoints_of(self.folder)):
            kept = set_aside(self.folder, iteration)
            say(f"going on after iteration {iteration}; what came later, and a copy of all records, is in {kept}")
        with writing(self.folder):
            for picture in later_samples(self.folder, iteration):
                picture.unlink()
        save_config(self.config, self.folder / "config.yaml")
        note_settings(self.folder, iteration, recorded(self.config, self.trainer.prompts))

    def _require_space(self) -> None:
        """Raises UserError where the disk lacks room for the checkpoints to come."""
        config, trainer = self.config, self.trainer
        done, last, every = trainer.iteration, config.train.iterations, config.checkpoint.every
        saves = len({*range(done - done % every + every, last + 1, every), last}) if done < last else 0
        keep = config.checkpoint.keep + bool(config.watch.every)
        require_space_for_all(self.folder, done, saves, keep, trainer.model.transformer, trainer.optimizer)

    def _shown_on(self, bar: Any) -> Callable[[Stage], contextlib.AbstractContextManager[None]]:
        """Has ``bar`` say which stage of which rollout is running: an iteration of a large model takes minutes."""
        train, began = self.config.train, 0
        rollouts = max(train.batch_size // self.config.rollout.batch_size, 1)

        def show(name: Stage) -> contextlib.AbstractContextManager[None]:
            nonlocal began
            began += name == "rollout"
            repeated = rollouts > 1 and name in ("rollout", "reward", "surrogate")
            of = f" {(began - 1) % rollouts + 1}/{rollouts}" if repeated else ""
            bar.set_description(f"train, {name}{of}")
            return contextlib.nullcontext()

        return show

    def _measure(self, log: MetricsLog) -> None:
        """Records and shows what the watch sees, if there is one. Raises UserError where a rule holds at the base."""
        watch, trainer = self.watch, self.trainer
        if watch is None:
            return
        with stage("watch"), trainer.optimizer.averaged_weights():
            record = watch.look(trainer.iteration, trainer.model, trainer.rewards)
        log.write_watch(record)
        say(shown(record, watch.base or {}))
        if watch.stop and trainer.iteration == 0:
            raise UserError(
                f"{watch.stop}, before any training; correct this rule, then continue with --resume {self.folder}"
            )

    @property
    def _stopped(self) -> bool:
        """Whether a rule held at the last measurement; so it did where an earlier process left it at that."""
        return self.watch is not None and self.watch.stop is not None

    def _save_samples(self) -> None:
        """A grid of the trainer's samples."""
        trainer = self.trainer
        images = trainer.draw_samples()
        if not processes.first():
            return
        folder = self.folder / "samples"
        with writing(folder):
            make_folder(folder)
        with beside(folder / f"step-{trainer.iteration}.png") as picture:
            image_grid(images, trainer.prompts[: len(images)]).save(picture, format="PNG")
            point("samples")

    def _save_checkpoint(self) -> None:
        config, trainer = self.config, self.trainer
        trainer.refuse_bad_weights()
        best_first = ranked(self.folder, config.watch.best_by)
        keep = config.checkpoint.keep
        with stage("saving"):
            model, optimizer = trainer.model.transformer, trainer.optimizer
            save_checkpoint(self.folder, trainer.iteration, model, optimizer, keep, best_first)
