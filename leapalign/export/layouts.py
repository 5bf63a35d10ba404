"""The names that the authors of a family gave the modules of its transformer, beside those of diffusers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Layout:
    """What of diffusers makes up the original modules."""

    modules: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Original module <- the diffusers modules whose rows it has, one below the other; ``{n}`` is a block's number.

    A parameter that is no module's weight or bias stands there by itself.
    """
    shift_first: tuple[str, ...] = ()
    """Original modules with rows of shift, then scale, where diffusers has scale, then shift.

    ``{last}`` is the last block's number.
    """
    rest: bool = False
    """Whether what is not in ``modules`` is called the same; else it has no place."""


def _modules(prefix: str, diffusers_prefix: str, names: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """``names``, each side behind its prefix; several of diffusers are separated by spaces."""
    return {
        f"{prefix}{original}": tuple(f"{diffusers_prefix}{part}" for part in parts.split())
        for original, parts in names.items()
    }


_MLP = {"in_layer": "linear_1", "out_layer": "linear_2"}
_NUMBERED_MLP = {"mlp.0": "linear_1", "mlp.2": "linear_2"}
_SHIFT_FIRST = "final_layer.adaLN_modulation.1"
_ENDS = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "final_layer.linear": ("proj_out",),
    _SHIFT_FIRST: ("norm_out.linear",),
}
_DOUBLE_ATTENTION = {
    "img_attn.qkv": "attn.to_q attn.to_k attn.to_v",
    "txt_attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
}
_SINGLE_NORMS = {"norm.query_norm": "attn.norm_q", "norm.key_norm": "attn.norm_k"}

FLUX = Layout(
    {
        **_ENDS,
        **_modules("time_in.", "time_text_embed.timestep_embedder.", _MLP),
        **_modules("vector_in.", "time_text_embed.text_embedder.", _MLP),
        **_modules("guidance_in.", "time_text_embed.guidance_embedder.", _MLP),
        **_modules(
            "double_blocks.{n}.",
            "transformer_blocks.{n}.",
            {
                **_DOUBLE_ATTENTION,
                "img_mod.lin": "norm1.linear",
                "txt_mod.lin": "norm1_context.linear",
                "img_mlp.0": "ff.net.0.proj",
                "img_mlp.2": "ff.net.2",
                "txt_mlp.0": "ff_context.net.0.proj",
                "txt_mlp.2": "ff_context.net.2",
            },
        ),
        **_modules(
            "single_blocks.{n}.",
            "single_transformer_blocks.{n}.",
            {
                **_SINGLE_NORMS,
                "modulation.lin": "norm.linear",
                "linear1": "attn.to_q attn.to_k attn.to_v proj_mlp",
                "linear2": "proj_out",
            },
        ),
    },
    shift_first=(_SHIFT_FIRST,),
)
FLUX2 = Layout(
    {
        **_ENDS,
        **_modules("time_in.", "time_guidance_embed.timestep_embedder.", _MLP),
        **_modules("guidance_in.", "time_guidance_embed.guidance_embedder.", _MLP),
        "double_stream_modulation_img.lin": ("double_stream_modulation_img.linear",),
        "double_stream_modulation_txt.lin": ("double_stream_modulation_txt.linear",),
        "single_stream_modulation.lin": ("single_stream_modulation.linear",),
        **_modules(
            "double_blocks.{n}.",
            "transformer_blocks.{n}.",
            {
                **_DOUBLE_ATTENTION,
                "img_mlp.0": "ff.linear_in",
                "img_mlp.2": "ff.linear_out",
                "txt_mlp.0": "ff_context.linear_in",
                "txt_mlp.2": "ff_context.linear_out",
            },
        ),
        **_modules(
            "single_blocks.{n}.",
            "single_transformer_blocks.{n}.",
            {**_SINGLE_NORMS, "linear1": "attn.to_qkv_mlp_proj", "linear2": "attn.to_out"},
        ),
    },
    shift_first=(_SHIFT_FIRST,),
)
STABLE_DIFFUSION_3 = Layout(
    {
        "pos_embed": ("pos_embed.pos_embed",),
        "x_embedder.proj": ("pos_embed.proj",),
        "context_embedder": ("context_embedder",),
        **_modules("t_embedder.", "time_text_embed.timestep_embedder.", _NUMBERED_MLP),
        **_modules("y_embedder.", "time_text_embed.text_embedder.", _NUMBERED_MLP),
        **_modules(
            "joint_blocks.{n}.x_block.",
            "transformer_blocks.{n}.",
            {
                "adaLN_modulation.1": "norm1.linear",
                "attn.qkv": "attn.to_q attn.to_k attn.to_v",
                "attn.ln_q": "attn.norm_q",
                "attn.ln_k": "attn.norm_k",
                "attn.proj": "attn.to_out.0",
                "attn2.qkv": "attn2.to_q attn2.to_k attn2.to_v",
                "attn2.ln_q": "attn2.norm_q",
                "attn2.ln_k": "attn2.norm_k",
                "attn2.proj": "attn2.to_out.0",
                "mlp.fc1": "ff.net.0.proj",
                "mlp.fc2": "ff.net.2",
            },
        ),
        **_modules(
            "joint_blocks.{n}.context_block.",
            "transformer_blocks.{n}.",
            {
                "adaLN_modulation.1": "norm1_context.linear",
                "attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
                "attn.ln_q": "attn.norm_added_q",
                "attn.ln_k": "attn.norm_added_k",
                "attn.proj": "attn.to_add_out",
                "mlp.fc1": "ff_context.net.0.proj",
                "mlp.fc2": "ff_context.net.2",
            },
        ),
        "final_layer.linear": ("proj_out",),
        _SHIFT_FIRST: ("norm_out.linear",),
    },
    # The last block's text goes nowhere, and is modulated as the end is.
    shift_first=(_SHIFT_FIRST, "joint_blocks.{last}.context_block.adaLN_modulation.1"),
)
Z_IMAGE = Layout(
    {
        "x_embedder": ("all_x_embedder.2-1",),
        "final_layer.linear": ("all_final_layer.2-1.linear",),
        _SHIFT_FIRST: ("all_final_layer.2-1.adaLN_modulation.1",),
        **{
            original: parts
            for blocks in ("noise_refiner.{n}.", "context_refiner.{n}.", "layers.{n}.")
            for original, parts in _modules(
                blocks,
                blocks,
                {
                    "attention.qkv": "attention.to_q attention.to_k attention.to_v",
                    "attention.q_norm": "attention.norm_q",
                    "attention.k_norm": "attention.norm_k",
                    "attention.out": "attention.to_out.0",
                },
            ).items()
        },
    },
    rest=True,
)
QWEN_IMAGE = Layout(rest=True)

LAYOUTS = {
    "FluxPipeline": FLUX,
    "Flux2Pipeline": FLUX2,
    "Flux2KleinPipeline": FLUX2,
    "StableDiffusion3Pipeline": STABLE_DIFFUSION_3,
    "ZImagePipeline": Z_IMAGE,
    "QwenImagePipeline": QWEN_IMAGE,
}
"""By the class of pipeline in a model's ``model_index.json``."""
