"""What tests of rewards share: pictures, a tokenizer of CLIP's kind, and open_clip's network in plain PyTorch."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

SIZES = [(48, 48), (80, 48), (45, 75), (20, 20), (33, 24)]
"""Heights and widths: square, portrait and landscape, larger and smaller than the models."""
# Rounded to 8 bit on the way in, after either pass of the resize, and once more where weights are fixed-point: four
# times 0.5/255, over the smallest std.
PIL_ROUNDING = 4 * 0.5 / 255 / 0.26


def smooth_images(height: int, width: int) -> Tensor:
    """Three images like photographs, little detail at the scale of a pixel, and nothing so dark or bright that a resize
    overshoots: PIL would clip that between its two passes, too."""
    return 0.2 + 0.6 * F.interpolate(torch.rand(3, 3, 6, 6), (height, width), mode="bicubic").clamp(0, 1)


def to_pictures(images: Tensor) -> list[Image.Image]:
    """``images (B, 3, H, W)`` in [0, 1] in 8 bit."""
    return [Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()) for image in images]


def from_pictures(pictures: list[Image.Image], mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """As torchvision's ToTensor and Normalize."""
    pixels = torch.stack([torch.tensor(list(picture.tobytes())).view(*picture.size[::-1], 3) for picture in pictures])
    return ((pixels / 255 - torch.tensor(mean)) / torch.tensor(std)).permute(0, 3, 1, 2)


def bytes_tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP's tokenizer without merges, 514 tokens, saved to ``folder``."""
    letters = list(bytes_to_unicode().values())
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[])
    tokenizer.save_pretrained(folder)
    return tokenizer


def bytes_tokens(prompts: list[str], length: int = 77) -> Tensor:
    """The tokens ``(B, length)`` of `bytes_tokenizer`, by hand: cut before the last one, zeros behind it.

    For lower-case words of letters with a space between.
    """
    letters = list(bytes_to_unicode().values())
    rows = torch.zeros(len(prompts), length, dtype=torch.int64)
    for row, prompt in zip(rows, prompts, strict=True):
        found = [512]
        for word in prompt.split():
            found += [letters.index(letter) for letter in word]
            found[-1] += 256
        found = [*found[: length - 1], 513]
        row[: len(found)] = torch.tensor(found)
    return rows


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(
            OrderedDict(c_fc=nn.Linear(width, 4 * width), gelu=nn.GELU(), c_proj=nn.Linear(4 * width, width))
        )

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads) for _ in range(layers))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class ImageTower(nn.Module):
    def __init__(self, width: int, heads: int, layers: int, side: int, patch: int, embed: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn((side // patch) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Transformer(width, heads, layers)
        self.proj = nn.Parameter(torch.randn(width, embed))

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.conv1(pixels).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(patches), 1, -1)
        x = self.ln_pre(torch.cat([first, patches], dim=1) + self.positional_embedding)
        return self.ln_post(self.transformer(x)[:, 0]) @ self.proj


class PlainClip(nn.Module):
    """open_clip's CLIP with its names of tensors, from its paper and layout: heads 80 and 64 wide as in ViT-H-14."""

    def __init__(self, vocabulary: int = 514, embed: int = 24) -> None:
        super().__init__()
        self.visual = ImageTower(width=160, heads=2, layers=2, side=28, patch=7, embed=embed)
        self.token_embedding = nn.Embedding(vocabulary, 128)
        self.positional_embedding = nn.Parameter(torch.randn(77, 128))
        self.transformer = Transformer(128, heads=2, layers=3)
        self.ln_final = nn.LayerNorm(128)
        self.text_projection = nn.Parameter(torch.randn(128, embed))
        self.logit_scale = nn.Parameter(torch.tensor(4.6))
        for parameter in self.parameters():
            # No tensor may be zero or one, or nothing would tell two of them apart.
            nn.init.normal_(parameter, std=0.3 if parameter.dim() < 2 else 0.1)

    def encode_text(self, tokens: Tensor) -> Tensor:
        mask = torch.full((tokens.shape[1], tokens.shape[1]), -torch.inf).triu(1)
        x = self.transformer(self.token_embedding(tokens) + self.positional_embedding, mask)
        return self.ln_final(x)[torch.arange(len(x)), tokens.argmax(dim=1)] @ self.text_projection

    def forward(self, pixels: Tensor, tokens: Tensor) -> Tensor:
        """Cosines ``(B,)``."""
        return F.cosine_similarity(self.visual(pixels), self.encode_text(tokens))
