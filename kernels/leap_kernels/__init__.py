"""Kernels for trainers that backpropagate rewards through flow-matching samplers.

Each op is one file: the formula, the reference in plain PyTorch, the kernels, and the function below, which
checks its arguments and picks a backend. Nothing here needs `leapalign`.
"""

from ._dispatch import BackendUnavailable, Explanation, explain, use_backend
from ._moments import Adam8bitState
from .accumulate import accumulate_
from .adaln_modulate import adaln_modulate
from .adamw_8bit_step import adamw_8bit_step_
from .adamw_8bit_step_many import adamw_8bit_step_many_
from .combine_gradient_terms import combine_gradient_terms
from .consistency_weighted_loss import consistency_weighted_loss
from .ema_update import ema_update_
from .euler_step import euler_step
from .gated_residual import gated_residual
from .gelu_tanh import gelu_tanh
from .group_norm_silu import group_norm_silu
from .leap_distances import leap_distances
from .leap_update import leap_update
from .patch import Patch, patch
from .qk_norm_rope import QK, qk_norm_rope
from .scale_gradient import scale_gradient
from .stochastic_round import stochastic_round_
from .swiglu import swiglu
from .total_norm import total_norm

__all__ = [
    "QK",
    "Adam8bitState",
    "BackendUnavailable",
    "Explanation",
    "Patch",
    "accumulate_",
    "adaln_modulate",
    "adamw_8bit_step_",
    "adamw_8bit_step_many_",
    "combine_gradient_terms",
    "consistency_weighted_loss",
    "ema_update_",
    "euler_step",
    "explain",
    "gated_residual",
    "gelu_tanh",
    "group_norm_silu",
    "leap_distances",
    "leap_update",
    "patch",
    "qk_norm_rope",
    "scale_gradient",
    "stochastic_round_",
    "swiglu",
    "total_norm",
    "use_backend",
]
