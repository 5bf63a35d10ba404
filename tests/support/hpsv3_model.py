"""A tiny HPSv3 in the published layout, and the model's own repository's way of calling it."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from leapalign.rewards import get_reward
from leapalign.rewards.hpsv3_prompt import conversation

PROMPTS = ["a red circle", "two squares to the left of a cross, drawn by a child"]


SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]


TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}"
    "<|im_end|>\n{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' or 'image' in "
    "content or 'image_url' in content %}{% set image_count.value = image_count.value + 1 %}{% if add_vision_id %}"
    "Picture {{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>{% elif content['type'] "
    "== 'video' or 'video' in content %}{% set video_count.value = video_count.value + 1 %}{% if add_vision_id %}"
    "Video {{ video_count.value }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>{% elif 'text' in content "
    "%}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}"
    "<|im_start|>assistant\n{% endif %}"
)
"""Qwen2-VL-7B-Instruct's, from its tokenizer_config.json."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE like Qwen2's, without ``<|Reward|>``, which its folder does not hold either."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=800, show_progress=False, initial_alphabet=tokenizer.pre_tokenizer.alphabet()
    )
    tokenizer.train_from_iterator([conversation("", 1)], trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|endoftext|>", chat_template=TEMPLATE, padding_side="left"
    )


def config_json(tokenizer: PreTrainedTokenizerFast) -> dict[str, object]:
    """In the flat layout of Qwen2-VL-7B-Instruct, which has more rows of embeddings than tokens."""
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "use_sliding_window": False,
        "sliding_window": 32768,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": len(tokenizer) + 37,
        "bos_token_id": 0,
        "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
        "vision_start_token_id": tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        "vision_end_token_id": tokenizer.convert_tokens_to_ids("<|vision_end|>"),
        "vision_token_id": 1,
        "image_token_id": tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        "video_token_id": 2,
        "vision_config": {
            "depth": 2,
            "embed_dim": 32,
            "mlp_ratio": 2,
            "num_heads": 2,
            "in_chans": 3,
            "hidden_size": 32,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
        },
    }


class PublishedVisionRotary(nn.Module):
    """transformers 4.45's, which HPSv3 runs on: a table of angles in the dtype of the frequencies, then its rows."""

    def __init__(self, width: int) -> None:
        """width: of an attention head."""
        super().__init__()
        frequencies = 1 / 10000 ** (torch.arange(0, width // 2, 2).float() / (width // 2))
        self.register_buffer("inv_freq", frequencies, persistent=False)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        places = torch.arange(int(position_ids.max()) + 1, dtype=self.inv_freq.dtype)
        angles = torch.outer(places, self.inv_freq)[position_ids].flatten(1)
        return torch.cat([angles.cos()] * 2, dim=1), torch.cat([angles.sin()] * 2, dim=1)


class Official(nn.Module):
    """HPSv3 as its repository assembles it, but for parameters in float32."""

    def __init__(self, folder: Path, rotary_dtype: torch.dtype = torch.bfloat16) -> None:
        """rotary_dtype: the repository's ``model.to(torch.bfloat16)`` casts the frequencies, too."""
        super().__init__()
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        self.tokenizer.add_special_tokens({"additional_special_tokens": ["<|Reward|>"]})
        self.tokenizer.padding_side = "right"
        self.model = Qwen2VLForConditionalGeneration(Qwen2VLConfig.from_pretrained(folder))
        self.model.resize_token_embeddings(len(self.tokenizer))
        self.rm_head = nn.Sequential(
            nn.Linear(32, 1024), nn.ReLU(), nn.Dropout(0.05), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)
        )
        self.model.model.visual.rotary_pos_emb = PublishedVisionRotary(16).to(rotary_dtype)
        self.model.model.language_model.rotary_emb.to(rotary_dtype)
        for parameter in self.parameters():  # as if trained: nothing is 0 or 1, scores differ
            nn.init.normal_(parameter, std=0.3 if parameter.ndim < 2 else parameter[0].numel() ** -0.5)
        for parameter in self.model.parameters():
            parameter.data = parameter.data.bfloat16().float()  # what the file holds

    def published(self) -> dict[str, Tensor]:
        """The tensors of ``HPSv3.safetensors``, named as transformers 4.45 named them, in bfloat16 but for the head."""
        tensors = {}
        for name, value in self.model.state_dict().items():
            name = name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
            tensors[name] = value.bfloat16().contiguous()
        return tensors | {f"rm_head.{name}": value for name, value in self.rm_head.state_dict().items()}

    def tokens(self, prompts: list[str], image_tokens: int) -> Tensor:
        end = "\nPlease provide the overall ratings of this image: <|Reward|>\n\nEND\n"
        asked = [
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question(prompt) + end}]}]
            for prompt in prompts
        ]
        texts = self.tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        texts = [text.replace("<|image_pad|>", "<|image_pad|>" * image_tokens) for text in texts]
        return self.tokenizer(texts, padding=True, return_tensors="pt").input_ids

    def forward(self, pixels: Tensor, grid: Tensor, prompts: list[str]) -> Tensor:
        """Each image's (mu, sigma). The repository hands its model embeddings without ids, and transformers 4.45 then
        counts positions one by one."""
        tokens = self.tokens(prompts, int(grid[0].prod()) // 4)
        embeddings = self.model.get_input_embeddings()(tokens)
        places = (tokens == self.model.config.image_token_id).unsqueeze(-1).expand_as(embeddings)
        seen = torch.cat(self.model.get_image_features(pixels, grid).pooler_output)
        padding = (tokens != self.tokenizer.pad_token_id).long()
        states = self.model.model.language_model(
            inputs_embeds=embeddings.masked_scatter(places, seen), attention_mask=padding
        ).last_hidden_state
        return self.rm_head(states.to(self.rm_head[0].weight.dtype))[
            tokens == self.tokenizer.convert_tokens_to_ids("<|Reward|>")
        ]


def question(prompt: str) -> str:
    """The repository's INSTRUCTION. That it is so, a test tells by its digest."""
    asked = conversation("{text_prompt}", 1).split("<|vision_end|>")[1]
    return asked.split("\nPlease provide the overall ratings")[0].format(text_prompt=prompt)


def load(folder: Path, **options: str):
    return get_reward("hpsv3", **{"path": str(folder), "dtype": "float32", **options})


def smooth_images(height: int, width: int, count: int = 2) -> Tensor:
    """Images like photographs: little detail at the scale of a pixel."""
    return F.interpolate(torch.rand(count, 3, 6, 6), (height, width), mode="bicubic").clamp(0, 1)
