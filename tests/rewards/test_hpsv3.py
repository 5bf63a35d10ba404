"""HPSv3 against transformers' Qwen2-VL, called as the model's own repository calls it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)

from leapalign.inputs.validation import UserError
from leapalign.rewards import get_reward
from leapalign.rewards.hpsv3 import _fuse
from leapalign.rewards.hpsv3_prompt import conversation

PROMPTS = ["a red circle", "two squares to the left of a cross, drawn by a child"]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
PIXELS = 256 * 28 * 28
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


class Official(nn.Module):
    """HPSv3 as its repository assembles it."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        self.tokenizer.add_special_tokens({"additional_special_tokens": ["<|Reward|>"]})
        self.tokenizer.padding_side = "right"
        self.model = Qwen2VLForConditionalGeneration(Qwen2VLConfig.from_pretrained(folder))
        self.model.resize_token_embeddings(len(self.tokenizer))
        self.rm_head = nn.Sequential(
            nn.Linear(32, 1024), nn.ReLU(), nn.Dropout(0.05), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)
        )
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
        return self.rm_head(states)[tokens == self.tokenizer.convert_tokens_to_ids("<|Reward|>")]


def question(prompt: str) -> str:
    """The repository's INSTRUCTION. That it is so, a test tells by its digest."""
    asked = conversation(prompt, 1).split("<|vision_end|>")[1]
    return asked.split("\nPlease provide the overall ratings")[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hpsv3")
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(path)
    (path / "config.json").write_text(json.dumps(config_json(tokenizer)))
    return path


@pytest.fixture(scope="module")
def official(folder: Path) -> Official:
    torch.manual_seed(0)
    model = Official(folder).eval()
    save_file(model.published(), folder / "HPSv3.safetensors")
    return model


def load(folder: Path, **options: str):
    return get_reward("hpsv3", **{"path": str(folder), "dtype": "float32", **options})


def smooth_images(height: int, width: int, count: int = 2) -> Tensor:
    """Images like photographs: little detail at the scale of a pixel."""
    return F.interpolate(torch.rand(count, 3, 6, 6), (height, width), mode="bicubic").clamp(0, 1)


def test_question_is_the_published_one() -> None:
    """Digest of the repository's INSTRUCTION and prompt_with_special_token, one after the other."""
    text = conversation("{text_prompt}", 1).split("<|vision_end|>")[1].split("<|im_end|>")[0]
    digest = "f6ee57479d4e9eee76b49c00dc962e1e696a5a2b3cc32cebd9b1fa76fe27502c"
    assert hashlib.sha256(text.encode()).hexdigest() == digest


def test_tokens_are_the_chat_templates(folder: Path, official: Official) -> None:
    torch.testing.assert_close(load(folder).tokenize(PROMPTS, 12), official.tokens(PROMPTS, 12))


@pytest.mark.parametrize("size", [(448, 448), (512, 512), (100, 60), (333, 777), (1024, 1024)])
def test_pixels_are_the_image_processors(folder: Path, official: Official, size: tuple[int, int]) -> None:
    # Mid-tones: PIL clips overshoot after either pass of the resize, tensors only at its end.
    images = 0.2 + 0.6 * smooth_images(*size)
    pictures = [Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()) for image in images]
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": PIXELS, "longest_edge": PIXELS})
    expected = processor(pictures, return_tensors="pt")
    pixels, grid = load(folder).preprocess(images)
    assert torch.equal(grid, expected.image_grid_thw)
    assert pixels.shape == expected.pixel_values.shape
    # Rounded to 8 bit on the way in, after either pass of the resize, and once more where weights are fixed-point:
    # four times 0.5/255, over the smallest std.
    assert float((pixels - expected.pixel_values).abs().max()) <= 4 * 0.5 / 255 / 0.26


def test_score_and_gradient_are_the_officials(folder: Path, official: Official) -> None:
    reward = load(folder)
    images = smooth_images(64, 96).requires_grad_()
    scores = reward(images, PROMPTS)
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    expected = official(*reward.preprocess(images), PROMPTS)[:, 0]
    (expected_gradient,) = torch.autograd.grad(expected.sum(), images)
    assert float(expected.detach().std()) > 1e-3
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))


def test_image_and_prompt_change_the_score(folder: Path, official: Official) -> None:
    reward = load(folder)
    images = smooth_images(64, 64)
    with torch.no_grad():
        scores, swapped = reward(images, PROMPTS), reward(images.flip(0), PROMPTS)
        asked = reward(images, PROMPTS[::-1])
    assert bool(((scores - swapped).abs() > 1e-4).all())
    assert bool(((scores - asked).abs() > 1e-4).all())


def test_batch_is_one_by_one(folder: Path, official: Official) -> None:
    """Prompts differ in length: padding changes no score and no gradient."""
    reward = load(folder)
    images = smooth_images(64, 64).requires_grad_()
    scores = reward(images, PROMPTS)
    single = torch.cat([reward(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(scores, single, rtol=1e-5, atol=1e-6)
    together, apart = (torch.autograd.grad(value.sum(), images)[0] for value in (scores, single))
    torch.testing.assert_close(together, apart, rtol=1e-3, atol=1e-4 * float(apart.abs().max()))


def test_gradient_reaches_saturated_pixels_and_no_weight(folder: Path, official: Official) -> None:
    reward = load(folder)
    images = smooth_images(56, 56)
    images[..., :28] = 1
    images[..., 28:] = 0
    images.requires_grad_()
    reward(images, PROMPTS).sum().backward()
    assert images.grad is not None
    assert bool((images.grad.abs().amax(dim=1) > 0).all())
    assert not reward.training
    assert not any(parameter.requires_grad for parameter in reward.parameters())


def test_layers_of_both_towers_are_recomputed(folder: Path, official: Official) -> None:
    reward = load(folder)
    runs = dict.fromkeys(("vision", "language"), 0)

    def count(name: str) -> Callable[..., None]:
        return lambda *_: runs.__setitem__(name, runs[name] + 1)

    for block in reward.model.visual.blocks:
        block.mlp.register_forward_pre_hook(count("vision"))
    for layer in reward.model.language_model.layers:
        layer.mlp.register_forward_pre_hook(count("language"))
    score = reward(smooth_images(64, 64, 1).requires_grad_(), PROMPTS[:1])
    assert runs == {"vision": 2, "language": 3}
    score.sum().backward()
    assert runs == {"vision": 4, "language": 6}


@pytest.mark.liger
@pytest.mark.cuda
def test_ligers_kernels_score_the_same(folder: Path, official: Official) -> None:
    # Not in Triton's interpreter: it hands scalars over as Python's, on which Liger 0.8.5 calls `.to`.
    plain, fused = load(folder), load(folder)
    _fuse(fused.model)
    images = smooth_images(64, 64, 1).to("cuda").requires_grad_()
    scores, fused_scores = (reward.to("cuda")(images, PROMPTS[:1]) for reward in (plain, fused))
    torch.testing.assert_close(fused_scores, scores, rtol=1e-4, atol=1e-5)
    expected, gradient = (torch.autograd.grad(score, images)[0] for score in (scores, fused_scores))
    assert not torch.equal(gradient, expected)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_bfloat16_scores_nearly_the_same_with_the_head_in_float32(folder: Path, official: Official) -> None:
    images = smooth_images(64, 64)
    half = load(folder, dtype="bfloat16")
    assert half.model.dtype == torch.bfloat16
    assert half.head[0].weight.dtype == torch.float32
    scores = half(images, PROMPTS)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, load(folder)(images, PROMPTS), rtol=0, atol=0.1)


def test_names_of_newer_transformers_will_do(folder: Path, official: Official, tmp_path: Path) -> None:
    newer = official.model.state_dict() | {f"rm_head.{k}": v for k, v in official.rm_head.state_dict().items()}
    save_file({name: value.contiguous() for name, value in newer.items()}, tmp_path / "HPSv3.safetensors")
    images = smooth_images(64, 64)
    scores = load(folder, path=str(tmp_path), base=str(folder))(images, PROMPTS)
    torch.testing.assert_close(scores, load(folder)(images, PROMPTS))


@pytest.mark.parametrize(
    ("dropped", "added", "message"),
    [
        ("rm_head.5.bias", {}, "missing: rm_head.5.bias"),
        ("model.layers.2.mlp.down_proj.weight", {}, "missing: model.layers.2.mlp.down_proj.weight"),
        ("visual.merger.ln_q.weight", {}, "missing: visual.merger.ln_q.weight"),
        ("", {"model.layers.3.mlp.down_proj.weight": (1,)}, "unexpected: model.layers.3.mlp.down_proj.weight"),
        ("", {"model.embed_tokens.weight": (9, 32)}, r"of another shape: model.embed_tokens.weight \(9, 32\)"),
    ],
)
def test_other_tensors_are_one_sentence(
    folder: Path, official: Official, tmp_path: Path, dropped: str, added: dict[str, tuple[int, ...]], message: str
) -> None:
    tensors = load_file(folder / "HPSv3.safetensors")
    tensors.pop(dropped, None)
    tensors |= {name: torch.zeros(shape) for name, shape in added.items()}
    save_file(tensors, tmp_path / "HPSv3.safetensors")
    with pytest.raises(UserError, match=rf"HPSv3\.safetensors' is not of .*{message}"):
        load(folder, path=str(tmp_path), base=str(folder))


def test_truncated_file_is_one_sentence(folder: Path, official: Official, tmp_path: Path) -> None:
    (tmp_path / "HPSv3.safetensors").write_bytes((folder / "HPSv3.safetensors").read_bytes()[:20000])
    with pytest.raises(UserError, match=r"cannot read weights from '.*HPSv3\.safetensors'"):
        load(folder, path=str(tmp_path), base=str(folder))


def test_missing_base_is_one_sentence(folder: Path, official: Official, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"check reward\.base"):
        load(folder, base=str(tmp_path))


def test_reserved_tokens_in_a_prompt_are_one_sentence(folder: Path, official: Official) -> None:
    reward = load(folder)
    for token in ("<|Reward|>", "<|image_pad|>"):
        with pytest.raises(UserError, match=r"prompt 'a .*' holds"):
            reward(smooth_images(64, 64), ["fine", f"a {token}"])
