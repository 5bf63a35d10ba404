"""Each reward beside the library it was published with, on the same small random weights."""

from __future__ import annotations

import html
import json
import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import ftfy
import hpsv3_model
import regex
import torch
from imagereward_model import MED_CONFIG, SIDE, Original
from official_transforms import cropped, normal, padded, qwen_patches
from reward_cases import PlainClip, bytes_tokenizer
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from leapalign.rewards import get_reward


@dataclass(frozen=True)
class Pair:
    """load: ours, with its options. official: the library's score ``(B,)`` of images and prompts. towers: what of it
    is cast where ours has another ``dtype``."""

    load: Callable[..., Any]
    official: Callable[[Tensor, list[str]], Tensor]
    towers: list[nn.Module]


def clip_folder(folder: Path) -> tuple[CLIPModel, CLIPTokenizer]:
    """A CLIP of transformers, its tokenizer that of bytes, saved to ``folder``."""
    layers = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    layers["projection_dim"] = 24
    text = {**layers, "vocab_size": 514, "bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513}
    vision = {**layers, "image_size": 28, "patch_size": 7}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).eval()
    vary(model)
    model.save_pretrained(folder)
    size = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    CLIPImageProcessor(**size).save_pretrained(folder)
    return model, bytes_tokenizer(folder)


def vary(module: nn.Module) -> None:
    """As if trained: nothing is 0 or 1, scores differ."""
    for parameter in module.parameters():
        if parameter.ndim > 0:
            nn.init.normal_(parameter, std=0.3 if parameter.ndim < 2 else parameter[0].numel() ** -0.5)


def clip_pair(name: str, folder: Path, factor: Callable[[CLIPModel], Tensor | float], **options: str) -> Pair:
    model, tokenizer = clip_folder(folder)

    def official(images: Tensor, prompts: list[str]) -> Tensor:
        tokens = tokenizer(prompts, padding=True, truncation=True, max_length=77, return_tensors="pt")
        pixels = normal(cropped(images, 28, math.floor)).to(model.dtype)
        found = model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, pixel_values=pixels)
        return factor(model) * (found.image_embeds.float() * found.text_embeds.float()).sum(dim=1)

    return Pair(lambda **more: get_reward(name, path=str(folder), **options, **more), official, [model])


def pickscore(folder: Path) -> Pair:
    return clip_pair("pickscore", folder, lambda model: model.logit_scale.float().exp(), scale="logit")


def clipscore(folder: Path) -> Pair:
    return clip_pair("clipscore", folder, lambda _: 100.0)


def open_clip_tokens(prompts: list[str]) -> Tensor:
    """open_clip's tokenizer, where no two bytes are merged: ``(B, 77)``, zeros behind the last token."""
    letters = list(bytes_to_unicode().values())
    pattern = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    rows = torch.zeros(len(prompts), 77, dtype=torch.int64)
    for row, prompt in zip(rows, prompts, strict=True):
        text = html.unescape(html.unescape(ftfy.fix_text(prompt))).strip()
        found = [512]
        for word in regex.findall(pattern, regex.sub(r"\s+", " ", text).strip().lower(), regex.IGNORECASE):
            found += [letters.index(bytes_to_unicode()[byte]) for byte in word.encode()]
            found[-1] += 256
        found = [*found[:76], 513]
        row[: len(found)] = torch.tensor(found)
    return rows


def hpsv2(folder: Path) -> Pair:
    network = PlainClip().eval()
    torch.save({"state_dict": network.state_dict()}, folder / "HPS_v2.1_compressed.pt")
    bytes_tokenizer(folder / "tokenizer")

    def official(images: Tensor, prompts: list[str]) -> Tensor:
        pixels = normal(padded(images, 28)).to(network.logit_scale.dtype)
        seen, read = network.visual(pixels), network.encode_text(open_clip_tokens(prompts))
        return F.cosine_similarity(seen.float(), read.float())

    paths = {"path": str(folder), "processor": str(folder / "tokenizer")}
    return Pair(lambda **more: get_reward("hpsv2", **paths, **more), official, [network])


def imagereward(folder: Path) -> Pair:
    letters = [chr(code) for code in range(33, 127)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    original = Original(len(words)).eval()
    torch.save(original.state_dict(), folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps({**MED_CONFIG, "vocab_size": len(words)}))
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(words)})
    tokenizer.save_pretrained(folder / "bert")

    def official(images: Tensor, prompts: list[str]) -> Tensor:
        tokens = tokenizer(prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
        pixels = normal(cropped(images, SIDE, round)).to(original.blip["vision_proj"].weight.dtype)
        return original(pixels, tokens.input_ids, tokens.attention_mask)

    paths = {"path": str(folder), "tokenizer": str(folder / "bert")}
    return Pair(lambda **more: get_reward("imagereward", **paths, **more), official, [original.blip])


def aesthetic(folder: Path) -> Pair:
    model, _ = clip_folder(folder)
    layers = zip(("0", "2", "4", "6", "7"), pairwise((24, 1024, 128, 64, 16, 1)), strict=True)
    head = nn.ModuleDict({"layers": nn.Sequential(OrderedDict((name, nn.Linear(*pair)) for name, pair in layers))})
    vary(head)
    torch.save(head.state_dict(), folder / "sac+logos+ava1-l14-linearMSE.pth")

    def official(images: Tensor, prompts: list[str]) -> Tensor:
        pixels = normal(cropped(images, 28, round)).to(model.dtype)
        seen = model.get_image_features(pixel_values=pixels).pooler_output.float()
        return head["layers"](seen / seen.norm(dim=1, keepdim=True))[:, 0]

    return Pair(lambda **more: get_reward("aesthetic", path=str(folder), tower=str(folder), **more), official, [model])


def hpsv3(folder: Path) -> Pair:
    tokenizer = hpsv3_model.build_tokenizer()
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(hpsv3_model.config_json(tokenizer)))
    model = hpsv3_model.Official(folder).eval()
    save_file(model.published(), folder / "HPSv3.safetensors")

    def official(images: Tensor, prompts: list[str]) -> Tensor:
        patches, grid = qwen_patches(images)
        return model(patches, grid, prompts)[:, 0]

    options = {"path": str(folder)}
    return Pair(
        lambda dtype="float32", **more: get_reward("hpsv3", **options, dtype=dtype, **more), official, [model.model]
    )


PAIRS: dict[str, Callable[[Path], Pair]] = {
    "pickscore": pickscore,
    "clipscore": clipscore,
    "hpsv2": hpsv2,
    "imagereward": imagereward,
    "aesthetic": aesthetic,
    "hpsv3": hpsv3,
}
