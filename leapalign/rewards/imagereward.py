"""ImageReward (arXiv 2304.05977): BLIP whose text encoder looks at the image, and linear layers on its first token.

The networks are transformers' BLIP classes, which descend from the code that ImageReward was trained with; only the
names of the tensors differ.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isqrt
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from leapalign.inputs.paths import PathText
from leapalign.inputs.prompt_limits import PromptLimit
from leapalign.inputs.tokenizers import read_tokenizer
from leapalign.inputs.validation import UserError, brief
from leapalign.reward_gradient import RewardFn
from leapalign.rewards.checkpoint_files import check_fit, find_file, read_tensors
from leapalign.rewards.preprocessing import cover, normalised
from leapalign.storage.embedded import resolve

MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of the scores on ImageReward's validation set; its package subtracts and divides by them."""
MAX_TOKENS = 35
ATTENTION_WIDTH = 64
"""Of an attention head of the image encoder, as in all of BLIP's; no file tells it."""
HEAD = {"0": 1024, "2": 128, "4": 64, "6": 16, "7": 1}
"""The layers that make a score of the first token, and how wide they are. Nothing is between them."""

TEXT_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "hidden_act",
    "layer_norm_eps",
)
"""What is read from ``med_config.json``."""

PUBLISHED = (
    (r"^vision\.embeddings\.class_embedding", "blip.visual_encoder.cls_token"),
    (r"^vision\.embeddings\.position_embedding", "blip.visual_encoder.pos_embed"),
    (r"^vision\.embeddings\.patch_embedding", "blip.visual_encoder.patch_embed.proj"),
    (r"^vision\.encoder\.layers", "blip.visual_encoder.blocks"),
    (r"^vision\.post_layernorm", "blip.visual_encoder.norm"),
    (r"\.self_attn\.projection", ".attn.proj"),
    (r"\.self_attn\.qkv", ".attn.qkv"),
    (r"\.layer_norm(\d)", r".norm\1"),
    (r"^text\.", "blip.text_encoder."),
    (r"^head\.", "mlp.layers."),
)
"""transformers' names of tensors, and what they are called in the file."""
UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")
"""Tensors of BLIP's pre-training that the file holds and the score does not need."""


@dataclass(frozen=True)
class ImageReward:
    """Score of ImageReward for image and prompt."""

    path: PathText = "THUDM/ImageReward"
    """``ImageReward.pt``, its folder, or a hub id; ``med_config.json``, the text encoder's sizes, lies beside it."""
    tokenizer: PathText = "bert-base-uncased"
    """Folder or hub id of BERT's tokenizer."""
    scale: Literal["raw", "standard"] = "standard"
    """``standard``: about -2 to 2, as its package prints; ``raw``: the network's output,
    ``standard * 1.03334 + 0.16717``."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the model's weights and arithmetic."""

    def load(self) -> RewardFn:
        """The reward with frozen weights. Raises UserError where the files cannot be read or do not fit together."""
        path = resolve(self.path)
        file = find_file(path, ("ImageReward.pt",))
        folder = str(file.parent) if Path(path).is_file() else path
        sizes = _text_sizes(find_file(folder, ("med_config.json",)))
        tokenizer = read_tokenizer(resolve(self.tokenizer), "BERT's tokenizer", "reward.tokenizer")
        if len(tokenizer) > sizes["vocab_size"]:
            raise UserError(
                f"the tokenizer of '{self.tokenizer}' has {len(tokenizer)} tokens, more than the {sizes['vocab_size']}"
                " that ImageReward knows; set reward.tokenizer to bert-base-uncased"
            )
        tensors = {name: value for name, value in read_tensors(file).items() if not name.startswith(UNUSED)}
        scorer = _scorer(sizes, tensors, file, tokenizer, self.scale)
        names = {published(name): name for name in scorer.state_dict()}
        check_fit({key: scorer.state_dict()[name].shape for key, name in names.items()}, tensors, file)
        scorer.load_state_dict({name: tensors[key] for key, name in names.items()})
        for tower in (scorer.vision, scorer.text):
            tower.to(getattr(torch, self.dtype))
        return scorer


class ImageRewardScorer(nn.Module):
    """``(images (B, 3, H, W) in [0, 1], prompts) -> (B,)``, differentiable in the images."""

    def __init__(
        self, vision: BlipVisionModel, text: BlipTextModel, head: nn.Sequential, tokenizer: Any, scale: str
    ) -> None:
        super().__init__()
        self.vision, self.text, self.head = vision, text, head
        self.tokenizer = tokenizer
        self.scale = scale
        self.eval().requires_grad_(False)

    @property
    def prompt_limit(self) -> PromptLimit:
        return PromptLimit.of(self.tokenizer, MAX_TOKENS)

    def preprocess(self, images: Tensor) -> Tensor:
        """``(B, 3, S, S)``: short side to the encoder's (bicubic, antialiased), torchvision's centre, normalised."""
        return normalised(cover(images, self.vision.config.image_size, centre=round))

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        # The package also gives its tokenizer [DEC] and [ENC], but no score uses them: the first token is [CLS].
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        ).to(images.device)
        seen = self.vision(pixel_values=self.preprocess(images).to(self.vision.dtype)).last_hidden_state
        read = self.text(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, encoder_hidden_states=seen
        ).last_hidden_state
        score = self.head(read[:, 0].to(self.head[0].weight.dtype)).squeeze(-1)
        return score if self.scale == "raw" else (score - MEAN) / STD


def published(name: str) -> str:
    """What the tensor that ``ImageRewardScorer`` calls ``name`` is called in ``ImageReward.pt``."""
    for pattern, replacement in PUBLISHED:
        name = re.sub(pattern, replacement, name)
    return name


def _text_sizes(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text())
        return {name: config[name] for name in TEXT_SIZES}
    except (ValueError, TypeError) as error:
        raise UserError(f"cannot read '{file}' ({brief(error)}); download the file again") from None
    except KeyError as error:
        raise UserError(f"'{file}' holds no {error}; use the med_config.json of ImageReward") from None


def _scorer(
    text: Mapping[str, Any], tensors: Mapping[str, Tensor], file: Path, tokenizer: Any, scale: str
) -> ImageRewardScorer:
    """With the image encoder as large as ``tensors`` have it, and random weights."""
    sizes = {"hidden_act": "gelu", "layer_norm_eps": 1e-6, **_vision_sizes(tensors, file)}
    vision = BlipVisionConfig(**sizes)
    # As a "decoder" it has cross-attention; how it is called makes it an encoder.
    config = BlipTextConfig(**text, encoder_hidden_size=vision.hidden_size, is_decoder=True)
    widths = (config.hidden_size, *HEAD.values())
    head = nn.Sequential(
        OrderedDict((name, nn.Linear(*pair)) for name, pair in zip(HEAD, pairwise(widths), strict=True))
    )
    return ImageRewardScorer(
        BlipVisionModel(vision), BlipTextModel(config, add_pooling_layer=False), head, tokenizer, scale
    )


def _vision_sizes(tensors: Mapping[str, Tensor], file: Path) -> dict[str, int]:
    encoder = "blip.visual_encoder."
    telling = [encoder + name for name in ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight")]
    missing = [name for name in telling if name not in tensors]
    if missing:
        raise UserError(f"'{file}' is not of ImageReward (missing: {', '.join(missing)}); use the published file")
    patches, positions, widened = (tensors[name].shape for name in telling)
    return {
        "hidden_size": patches[0],
        "intermediate_size": widened[0],
        "num_hidden_layers": len({name.split(".")[3] for name in tensors if name.startswith(encoder + "blocks.")}),
        "num_attention_heads": max(1, patches[0] // ATTENTION_WIDTH),
        "image_size": patches[-1] * isqrt(positions[1] - 1),
        "patch_size": patches[-1],
    }
