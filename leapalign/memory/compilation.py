"""Whether PyTorch can compile for a device: a kernel of its compiler, built and run."""

from __future__ import annotations

import torch

from leapalign.inputs.validation import UserError, brief


def require_compiler(device: torch.device) -> None:
    """Raises UserError where `torch.compile` does not work on ``device``. Takes some seconds, the first time."""
    needs = "Triton and a C compiler" if device.type == "cuda" else "a C++ compiler"
    try:
        torch.compile(torch.sin)(torch.ones(16, device=device))
    except Exception as error:  # of Triton, or of what builds for it
        reason = brief(error).partition(" Set TORCHDYNAMO_VERBOSE")[0]  # which is for those who write compilers
        raise UserError(
            f"model.compile needs {needs}, and PyTorch cannot compile here ({reason}); install what is missing, "
            "or set model.compile to false"
        ) from None
