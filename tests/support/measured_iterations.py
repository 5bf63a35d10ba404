"""What a real iteration needs, counted."""

from __future__ import annotations

import gc

import torch

from leapalign.config import Config
from leapalign.planning.ledger import StorageLedger
from leapalign.trainer import Trainer


def measured(config: Config) -> StorageLedger:
    """The ledger of a real iteration, everything that it needs counted, but for the prompts' embeddings."""
    with StorageLedger() as ledger:
        trainer = Trainer.from_config(config)
        # Files are read past PyTorch's operations; masters in host memory, and their copies, are not.
        if config.memory.optimizer == "device" and config.memory.weights == "resident":
            transformer = trainer.model.transformer
            ledger.count(*transformer.parameters(), *transformer.buffers(), role="weights")
        for term in trainer.rewards:
            ledger.count(*term.reward.parameters(), *term.reward.buffers(), role="reward")
        trainer.embeddings = trainer.embeddings[torch.arange(len(trainer.prompts))]
        ledger.exclude(*trainer.embeddings.tensors())
        trainer.train_one()
    # What dies later would count as the work of whatever stage runs by then.
    del trainer
    gc.collect()
    return ledger
