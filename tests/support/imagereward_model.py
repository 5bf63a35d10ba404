"""A BLIP with ImageReward's head, written from the names and shapes in the published file."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "circle", "two", "squares", "left", "of", "cross"]
SIDE, PATCH, WIDTH, TEXT, VOCABULARY = 32, 16, 128, 48, 16
MED_CONFIG = {
    "architectures": ["BertModel"],
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": TEXT,
    "initializer_range": 0.02,
    "intermediate_size": 64,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 40,
    "model_type": "bert",
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "type_vocab_size": 2,
    "vocab_size": VOCABULARY,
    "encoder_width": TEXT,
    "add_cross_attention": True,
}


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """Softmax attention of ``(B, L, D)``; keys where ``mask (B, L)`` is 0 are not looked at."""
    query, key, value = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(mask[:, None, None] == 0, -math.inf)
    return (scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(2)


class VitBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH, eps=1e-6), nn.LayerNorm(WIDTH, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(WIDTH, 3 * WIDTH), "proj": nn.Linear(WIDTH, WIDTH)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(WIDTH, 96), "fc2": nn.Linear(96, WIDTH)})

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.attn["qkv"](self.norm1(x)).chunk(3, dim=-1)
        x = x + self.attn["proj"](attend(query, key, value, heads=WIDTH // 64))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class Vit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + (SIDE // PATCH) ** 2, WIDTH))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, WIDTH, PATCH, PATCH)})
        self.blocks = nn.Sequential(VitBlock(), VitBlock(), VitBlock())
        self.norm = nn.LayerNorm(WIDTH, eps=1e-6)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embed["proj"](pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(pixels), -1, -1), patches], dim=1) + self.pos_embed
        return self.norm(self.blocks(x))


def residual(inputs: int) -> nn.ModuleDict:
    return nn.ModuleDict({"dense": nn.Linear(inputs, TEXT), "LayerNorm": nn.LayerNorm(TEXT, eps=1e-12)})


def add(module: nn.ModuleDict, x: Tensor, residue: Tensor) -> Tensor:
    return module["LayerNorm"](module["dense"](x) + residue)


def attention(seen: int) -> nn.ModuleDict:
    own = nn.ModuleDict({"query": nn.Linear(TEXT, TEXT), "key": nn.Linear(seen, TEXT), "value": nn.Linear(seen, TEXT)})
    return nn.ModuleDict({"self": own, "output": residual(TEXT)})


class BertLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.crossattention = attention(TEXT), attention(WIDTH)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(TEXT, 64)})
        self.output = residual(64)

    def forward(self, x: Tensor, mask: Tensor, image: Tensor) -> Tensor:
        for module, seen, hidden in ((self.attention, x, mask), (self.crossattention, image, None)):
            own = module["self"]
            looked = attend(own["query"](x), own["key"](seen), own["value"](seen), 3, hidden)
            x = add(module["output"], looked, x)
        return add(self.output, F.gelu(self.intermediate["dense"](x)), x)


class Bert(nn.Module):
    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embeddings = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(vocabulary, TEXT),
                "position_embeddings": nn.Embedding(40, TEXT),
                "LayerNorm": nn.LayerNorm(TEXT, eps=1e-12),
            }
        )
        self.embeddings.register_buffer("position_ids", torch.arange(40).expand(1, -1))
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList([BertLayer(), BertLayer()])})

    def forward(self, ids: Tensor, mask: Tensor, image: Tensor) -> Tensor:
        parts = self.embeddings
        x = parts["word_embeddings"](ids) + parts["position_embeddings"](torch.arange(ids.shape[1]))
        x = parts["LayerNorm"](x)
        for layer in self.encoder["layer"]:
            x = layer(x, mask, image)
        return x


class Original(nn.Module):
    """Its state dict has the names of ``ImageReward.pt``."""

    def __init__(self, vocabulary: int = VOCABULARY) -> None:
        super().__init__()
        self.blip = nn.ModuleDict(
            {
                "visual_encoder": Vit(),
                "text_encoder": Bert(vocabulary),
                "vision_proj": nn.Linear(WIDTH, 8),
                "text_proj": nn.Linear(TEXT, 8),
            }
        )
        linear = [nn.Linear(TEXT, 1024), nn.Linear(1024, 128), nn.Linear(128, 64), nn.Linear(64, 16), nn.Linear(16, 1)]
        first, second, third, fourth, last = linear
        drop = nn.Dropout(0.1)
        self.mlp = nn.ModuleDict({"layers": nn.Sequential(first, drop, second, drop, third, drop, fourth, last)})
        for parameter in self.parameters():  # as if trained: nothing is 0 or 1, scores differ
            nn.init.normal_(parameter, std=0.3 if parameter.ndim < 2 else 1.5 / math.sqrt(parameter.shape[-1]))

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        text = self.blip["text_encoder"](ids, mask, self.blip["visual_encoder"](pixels))
        return (
            self.mlp["layers"](text[:, 0].to(self.mlp["layers"][0].weight.dtype)).squeeze(-1) - 0.16717362830052426
        ) / 1.0333394966054072
