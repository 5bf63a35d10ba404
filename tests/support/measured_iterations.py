"""What a real iteration needs, and what comes between iterations, counted."""

from __future__ import annotations

import gc
from pathlib import Path

import torch

from leapalign.config import Config
from leapalign.memory.quantization import scales
from leapalign.memory.residency import stage
from leapalign.planning.between import count_watch_rewards
from leapalign.planning.ledger import StorageLedger
from leapalign.prompts.embeddings import embeddings_of
from leapalign.runs.checkpoint import save_checkpoint
from leapalign.trainer import Trainer
from leapalign.watch.watch import Watch


def measured(config: Config) -> StorageLedger:
    """The ledger of a real run's first samples, measurement, checkpoint and iteration.

    Everything that they need is counted, but for the prompts' embeddings.
    """
    watch = Watch.from_config(config)
    with StorageLedger() as ledger:
        if watch:
            count_watch_rewards(ledger, watch.rewards, host=True)
        trainer = Trainer.from_config(config)
        # Files are read past PyTorch's operations; masters in host memory, and their copies, are not.
        if config.memory.optimizer == "device" and config.memory.weights == "resident":
            transformer = trainer.model.transformer
            ledger.count(*transformer.parameters(), *transformer.buffers(), *scales(transformer), role="weights")
        for term in trainer.rewards:
            ledger.count(*term.reward.buffers(), role="reward")
            if config.memory.rewards == "resident":
                ledger.count(*term.reward.parameters(), role="reward")
        trainer.embeddings = trainer.embeddings[torch.arange(len(trainer.prompts))]
        ledger.exclude(*trainer.embeddings.tensors())
        ledger.begin_events()
        trainer.draw_samples()
        if watch:
            _look(watch, trainer, ledger)
        with stage("saving"):
            save_checkpoint(Path(config.output), 0, trainer.model.transformer, trainer.optimizer, keep=1)
        trainer.train_one()
    # What dies later would count as the work of whatever stage runs by then.
    del trainer
    gc.collect()
    return ledger


def _look(watch: Watch, trainer: Trainer, ledger: StorageLedger) -> None:
    """A measurement after the first."""
    watch.embeddings = embeddings_of(trainer.config, watch.prompts, "watch.prompts")
    ledger.exclude(*watch.embeddings.tensors())
    Path(trainer.config.output).mkdir()
    watch.look(0, trainer.model, trainer.rewards)
    with stage("watch"), trainer.optimizer.averaged_weights():
        count_watch_rewards(ledger, watch.rewards, host=False)
        watch.look(1, trainer.model, trainer.rewards)
    count_watch_rewards(ledger, watch.rewards, host=True)
