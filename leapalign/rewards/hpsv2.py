"""HPSv2.1 (arXiv 2306.09341): open_clip's ViT-H-14 trained on human preferences, run by transformers' CLIP classes.

The two compute the same; only the names of the tensors differ, and q, k and v are one tensor in the file.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any, Literal

import torch
from ftfy import fix_text
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, PreTrainedTokenizerBase

from leapalign.inputs.paths import PathText
from leapalign.inputs.tokenizers import read_tokenizer
from leapalign.inputs.validation import UserError
from leapalign.reward_gradient import RewardFn
from leapalign.rewards.checkpoint_files import check_fit, find_file, read_tensors
from leapalign.rewards.clip_scorer import ClipScorer
from leapalign.rewards.preprocessing import contain
from leapalign.rewards.simulated import VIT_H_14, simulated_clip
from leapalign.storage.embedded import resolve

FILES = ("HPS_v2.1_compressed.pt", "HPS_v2.1_compressed.safetensors", "model.safetensors")
IMAGE_HEAD, TEXT_HEAD = 80, 64
"""Widths of ViT-H-14's attention heads; no file tells them."""

PUBLISHED = (
    (r"^text_model\.embeddings\.token_embedding", "token_embedding"),
    (r"^text_model\.embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"^text_model\.final_layer_norm", "ln_final"),
    (r"^text_projection\.weight", "text_projection"),
    (r"^vision_model\.embeddings\.class_embedding", "visual.class_embedding"),
    (r"^vision_model\.embeddings\.patch_embedding", "visual.conv1"),
    (r"^vision_model\.embeddings\.position_embedding\.weight", "visual.positional_embedding"),
    (r"^vision_model\.pre_layrnorm", "visual.ln_pre"),
    (r"^vision_model\.post_layernorm", "visual.ln_post"),
    (r"^visual_projection\.weight", "visual.proj"),
    (r"^text_model\.encoder\.layers", "transformer.resblocks"),
    (r"^vision_model\.encoder\.layers", "visual.transformer.resblocks"),
    (r"\.layer_norm(\d)", r".ln_\1"),
    (r"\.self_attn\.[qkv]_proj\.", ".attn.in_proj_"),
    (r"\.self_attn\.out_proj", ".attn.out_proj"),
    (r"\.fc1\.", ".c_fc."),
    (r"\.fc2\.", ".c_proj."),
)
"""transformers' names of tensors, and what they are called in the file."""


@dataclass(frozen=True)
class HPSv2:
    """Cosine of image and prompt embeddings, about 0.25 to 0.42 for HPSv2.1."""

    path: PathText = "xswu/HPSv2"
    """``HPS_v2.1_compressed.pt`` or a safetensors copy with the same keys, its folder, or a hub id."""
    processor: PathText = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    """Folder or hub id of CLIP's tokenizer."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the model's weights and arithmetic."""
    clip_overshoot: bool = True
    """Pixels that resizing takes out of [0, 1] are clipped, as in the 8-bit pictures that HPSv2 was trained and scores
    on; false: they stay, as its transform leaves those of float tensors."""

    def load(self) -> RewardFn:
        """The reward with frozen weights. Raises UserError where the files cannot be read or do not fit together."""
        file = find_file(resolve(self.path), FILES)
        tensors = read_tensors(file, key="state_dict")
        folder = resolve(self.processor)
        tokenizer = read_tokenizer(folder, "CLIP's tokenizer", "reward.processor")
        config = _config(tensors, file, tokenizer.eos_token_id)
        if len(tokenizer) != config.text_config.vocab_size:
            raise UserError(
                f"'{file}' knows {config.text_config.vocab_size} tokens and the tokenizer of '{folder}' has "
                f"{len(tokenizer)}; check reward.processor"
            )
        model = _model(config, tensors, file, getattr(torch, self.dtype))
        return HPSv2Scorer(model, tokenizer, self.clip_overshoot)

    def simulated(self) -> nn.Module:
        """As large as ViT-H-14."""
        return simulated_clip(CLIPConfig.from_pretrained(VIT_H_14), self.dtype)


class HPSv2Scorer(ClipScorer):
    """A `ClipScorer` with open_clip's way of reading prompts and HPSv2's way of fitting images."""

    def __init__(self, model: CLIPModel, tokenizer: PreTrainedTokenizerBase, clip_overshoot: bool) -> None:
        super().__init__(model, tokenizer, CLIPImageProcessor(), "cosine")
        self.clip_overshoot = clip_overshoot

    def fit(self, images: Tensor) -> Tensor:
        """``(B, 3, S, S)`` at the model's size: long side to it (bicubic, antialiased), the rest black."""
        return contain(images, self.side, self.clip_overshoot)

    def text(self, prompt: str) -> str:
        """The `cleaned` prompt."""
        return cleaned(prompt)


def cleaned(prompt: str) -> str:
    """As open_clip's tokenizer does first: characters mended by ftfy, and HTML undone."""
    return html.unescape(html.unescape(fix_text(prompt))).strip()


def published(name: str) -> str:
    """What the tensor that `CLIPModel` calls ``name``, or has a part of, is called in the file."""
    for pattern, replacement in PUBLISHED:
        name = re.sub(pattern, replacement, name)
    return name


def _config(tensors: Mapping[str, Tensor], file: Path, end: int) -> CLIPConfig:
    """Sizes of both towers as ``tensors`` have them. end: the token at which a text is pooled."""
    telling = (
        "visual.proj",
        "visual.conv1.weight",
        "visual.positional_embedding",
        "visual.transformer.resblocks.0.mlp.c_fc.weight",
        "token_embedding.weight",
        "positional_embedding",
        "transformer.resblocks.0.mlp.c_fc.weight",
    )
    missing = [name for name in telling if name not in tensors]
    if missing:
        raise UserError(f"'{file}' is not of HPSv2 (missing: {', '.join(missing)}); use HPS_v2.1_compressed.pt")
    projection, patches, places, widened, words, positions, text_widened = (tensors[name].shape for name in telling)
    image_width, text_width = projection[0], words[-1]
    if image_width % IMAGE_HEAD or text_width % TEXT_HEAD:
        raise UserError(
            f"'{file}' is not of HPSv2 (visual.proj has {image_width} rows, token_embedding.weight {text_width} "
            f"columns; ViT-H-14 has multiples of {IMAGE_HEAD} and {TEXT_HEAD}); use HPS_v2.1_compressed.pt"
        )
    shared = {"projection_dim": projection[-1], "hidden_act": "gelu"}
    vision = {
        "hidden_size": image_width,
        "intermediate_size": widened[0],
        "num_attention_heads": image_width // IMAGE_HEAD,
        "num_hidden_layers": _depth(tensors, "visual.transformer.resblocks."),
        "patch_size": patches[-1],
        "image_size": patches[-1] * isqrt(places[0] - 1),
    }
    text = {
        "hidden_size": text_width,
        "intermediate_size": text_widened[0],
        "num_attention_heads": text_width // TEXT_HEAD,
        "num_hidden_layers": _depth(tensors, "transformer.resblocks."),
        "vocab_size": words[0],
        "max_position_embeddings": positions[0],
        "eos_token_id": end,
    }
    return CLIPConfig(text_config=text | shared, vision_config=vision | shared, projection_dim=projection[-1])


def _depth(tensors: Mapping[str, Tensor], blocks: str) -> int:
    return len({name.removeprefix(blocks).split(".")[0] for name in tensors if name.startswith(blocks)})


def _model(config: CLIPConfig, tensors: Mapping[str, Tensor], file: Path, dtype: torch.dtype) -> CLIPModel:
    """With the weights of ``tensors``; raises UserError where they are not those of ``config``."""
    with torch.device("meta"):
        wanted = {name: value.shape for name, value in CLIPModel(config).state_dict().items()}
    check_fit({published(name): _whole(name, shape) for name, shape in wanted.items()}, tensors, file)
    parts: Any = {name: _part(name, tensors[published(name)]) for name in wanted}
    return CLIPModel.from_pretrained(None, config=config, state_dict=parts, dtype=dtype)


def _whole(name: str, shape: torch.Size) -> torch.Size:
    """The shape in the file of the tensor that ``name`` is a part of."""
    if re.search(r"[qkv]_proj", name):
        return torch.Size((3 * shape[0], *shape[1:]))
    return shape[::-1] if _is_projection(name) else shape


def _part(name: str, tensor: Tensor) -> Tensor:
    """What ``name`` is of its tensor in the file."""
    third = re.search(r"([qkv])_proj", name)
    if third:
        return tensor.chunk(3)["qkv".index(third[1])]
    return tensor.T if _is_projection(name) else tensor


def _is_projection(name: str) -> bool:
    """Whether the file has it as rows times columns, not as a linear layer."""
    return name in ("visual_projection.weight", "text_projection.weight")
