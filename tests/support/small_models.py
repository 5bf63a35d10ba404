"""Small random networks of diffusers that tests of the kernels share with others."""

from __future__ import annotations

from typing import Any

from diffusers import AutoencoderKL, FluxTransformer2DModel


def small_flux(**changes: Any) -> FluxTransformer2DModel:
    """A random FLUX of one double and one single block, over packed latents of 16 channels, but for ``changes``."""
    sizes = {
        "patch_size": 1,
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 12,
        "num_attention_heads": 2,
        "joint_attention_dim": 20,
        "pooled_projection_dim": 10,
        "guidance_embeds": False,
        "axes_dims_rope": (4, 4, 4),
    }
    return FluxTransformer2DModel(**{**sizes, **changes})


def small_vae() -> AutoencoderKL:
    """Of Stable Diffusion 3's settings, at a factor of 8."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8,) * 4,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
