"""What a user is told of an error: of bad input and of what the machine lacks, one sentence."""

from __future__ import annotations

from leapalign.inputs.validation import UserError, brief

FULL = (
    "the memory is full; lower rollout.batch_size, train.microbatch, rollout.num_steps or the size of the images, and "
    "see leapalign memory --config CONFIG --auto for what fits"
)


def user_error(error: Exception) -> UserError | None:
    """The sentence for ``error``; None for a bug, whose traceback is of use."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, OSError):
        return UserError(f"{brief(error)}; check the path, its permissions and the room on its disk")
    return UserError(FULL) if says_full(error) else None


SAID_WHEN_FULL = ("can't allocate memory", "could not create a primitive")
"""What a RuntimeError says on a CPU: PyTorch's allocator, and oneDNN, which does not give the reason."""


def says_full(error: Exception) -> bool:
    """Whether no memory was left, on a GPU or beside it."""
    import torch  # which a config that is wrong need not wait for

    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(one in str(error) for one in SAID_WHEN_FULL)
