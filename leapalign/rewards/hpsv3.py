"""HPSv3 (arXiv 2508.03789): Qwen2-VL-7B asked to rate an image, and a small network on what it thinks at one token."""

from __future__ import annotations

import importlib.util
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Qwen2VLConfig, Qwen2VLModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from leapalign.inputs.hub import unreadable
from leapalign.inputs.paths import PathText
from leapalign.inputs.tokenizers import read_tokenizer
from leapalign.inputs.validation import UserError
from leapalign.memory.placement import place_reward, training_device
from leapalign.memory.quantization import quantize, require_quantizer
from leapalign.reward_gradient import RewardFn
from leapalign.rewards.checkpoint_files import check_fit, find_file, read_tensors
from leapalign.rewards.hpsv3_prompt import IMAGE_TOKEN, REWARD_TOKEN, conversation
from leapalign.rewards.hpsv3_rotary import cast_rotary
from leapalign.rewards.preprocessing import normalised, resize
from leapalign.rewards.simulated import QWEN2_VL_7B
from leapalign.storage.embedded import resolve

BASE = "Qwen/Qwen2-VL-7B-Instruct"
PIXELS = 256 * 28 * 28
"""That every image is brought to, but for rounding to whole patches."""
TEXT_TOKENS = 700
"""Of a conversation in a simulation: what HPSv3 asks, and a prompt of about a hundred."""
LAYERS = ("visual.blocks.", "language_model.layers.")
"""How the names of their layers begin, in both towers."""
HEAD = {"0": 1024, "3": 16, "5": 2}
"""Linear layers of the head and how wide they are, ReLU between; 1, 2 and 4 hold no tensors. It yields mu, sigma."""


@dataclass(frozen=True)
class HPSv3:
    """Mean (mu) of HPSv3's score for image and prompt; unbounded, higher is better."""

    path: PathText = "MizzenAI/HPSv3"
    """``HPSv3.safetensors``, its folder, or a hub id."""
    base: PathText | None = None
    """Folder or hub id of Qwen2-VL's ``config.json`` and tokenizer, its weights are not read; null: the checkpoint's
    folder where that holds a ``config.json``, else the model HPSv3 began as."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of Qwen2-VL; the head is in float32."""
    quantization: Literal["int8"] | None = None
    """Of the layers of both towers, by bitsandbytes: 8.5 bits a weight; null: ``dtype``."""
    rotary_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the frequencies of both rotary embeddings: ``bfloat16``, as HPSv3's own code casts them, or exact."""

    def load(self) -> RewardFn:
        """The reward with frozen weights. Raises UserError where the files cannot be read or do not fit together."""
        device, dtype = training_device(), getattr(torch, self.dtype)
        require_quantizer(self.quantization, dtype, device, "reward.quantization")
        file = find_file(resolve(self.path), ("HPSv3.safetensors",))
        beside = str(file.parent) if (file.parent / "config.json").is_file() else BASE
        base = resolve(self.base or beside)
        try:
            config = Qwen2VLConfig.from_pretrained(base)
        except Exception as error:  # what damaged files make the library raise has no common type
            raise unreadable(error, base, "reward.base", f"cannot load Qwen2-VL's config of '{base}'") from None
        tokenizer = read_tokenizer(base, "Qwen2-VL's tokenizer", "reward.base")
        tokenizer.add_tokens([REWARD_TOKEN], special_tokens=True)
        config.text_config.vocab_size = len(tokenizer)
        model, head = _networks(config, _published_tensors(file), file, dtype)
        self._quantize(model, device)
        cast_rotary(model, getattr(torch, self.rotary_dtype))
        if torch.cuda.is_available() and importlib.util.find_spec("liger_kernel"):
            _fuse(model)
        return HPSv3Scorer(model, head, tokenizer, tokenizer.convert_tokens_to_ids(REWARD_TOKEN))

    def simulated(self) -> nn.Module:
        """As large as Qwen2-VL-7B and the head."""
        config = Qwen2VLConfig.from_pretrained(QWEN2_VL_7B)
        # Models on fake tensors cannot be cast: they are built in their dtype.
        model = Qwen2VLModel._from_config(config, dtype=getattr(torch, self.dtype))
        self._quantize(model, torch.device("cpu"))
        return _SimulatedHPSv3(model, _head(config.text_config.hidden_size), None, reward_token=1)

    def _quantize(self, model: Qwen2VLModel, device: torch.device) -> None:
        """Of what ``quantization`` says, made on ``device``, and back in host memory."""
        if self.quantization is not None:
            quantize(model, self.quantization, device, lambda name: name.startswith(LAYERS), "reward.quantization")
            place_reward(model, torch.device("cpu"))


class HPSv3Scorer(nn.Module):
    """``(images (B, 3, H, W) in [0, 1], prompts) -> (B,)``, differentiable in the images.

    Layers of both towers are recomputed in the backward pass. Raises UserError where a prompt holds tokens that mark
    the image or the score.
    """

    def __init__(self, model: Qwen2VLModel, head: nn.Sequential, tokenizer: Any, reward_token: int) -> None:
        """reward_token: at which the score is read."""
        super().__init__()
        self.reward_token = reward_token
        self.model, self.head = model, head
        self.tokenizer = tokenizer
        self.eval().requires_grad_(False)
        # transformers would recompute them in training mode alone. Nothing in a layer is random.
        for layer in (*model.visual.blocks, *model.language_model.layers):
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)

    def preprocess(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """As Qwen2-VL's image processor: patches ``(B * rows * columns, 3 * time * side * side)`` of the normalised
        images at about `PIXELS` (bicubic, antialiased), and ``(B, 3)``, each image's ``(1, rows, columns)``.

        Patches of a merged square follow each other; in time, each is there ``temporal_patch_size`` times.
        """
        sizes = self.model.config.vision_config
        side, merge = sizes.patch_size, sizes.spatial_merge_size
        height, width = smart_resize(*images.shape[-2:], side * merge, min_pixels=PIXELS, max_pixels=PIXELS)
        squares = (
            normalised(resize(images, height, width)).unflatten(3, (-1, merge, side)).unflatten(2, (-1, merge, side))
        )
        patches = squares.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6)
        patches = patches.expand(-1, -1, -1, -1, -1, -1, sizes.temporal_patch_size, -1, -1)
        grid = torch.tensor([[1, height // side, width // side]] * len(images), device=images.device)
        return patches.flatten(5).flatten(0, 4), grid

    def tokenize(self, prompts: Sequence[str], image_tokens: int) -> Tensor:
        """``(B, L)``, the shorter ones padded at their end."""
        texts = [conversation(prompt, image_tokens) for prompt in prompts]
        tokens: Tensor = self.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt").input_ids
        for name, count in ((REWARD_TOKEN, 1), (IMAGE_TOKEN, image_tokens)):
            odd = (tokens == self.tokenizer.convert_tokens_to_ids(name)).sum(dim=1) != count
            if odd.any():
                raise UserError(
                    f"prompt '{prompts[int(odd.nonzero()[0])]}' holds {name}, which HPSv3 reserves; drop it"
                )
        return tokens

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        towers, config = self.model, self.model.config
        patches, grid = self.preprocess(images)
        image_tokens = len(patches) // len(images) // config.vision_config.spatial_merge_size**2
        tokens = self.tokenize(prompts, image_tokens)
        # Every conversation begins alike, with the image.
        start = int((tokens[0] == config.image_token_id).int().argmax())
        rated = (tokens == self.reward_token).int().argmax(dim=1)
        tokens = tokens.to(images.device)
        read = towers.language_model.embed_tokens(tokens)
        seen = towers.visual(patches.to(read.dtype), grid_thw=grid).pooler_output.unflatten(0, (len(images), -1))
        # HPSv3 was trained with positions that count tokens, not with Qwen2-VL's, which count the image's rows and
        # columns. Padding needs no mask: it comes last, and tokens see those before them alone.
        states = towers.language_model(
            inputs_embeds=torch.cat([read[:, :start], seen, read[:, start + image_tokens :]], dim=1),
            position_ids=torch.arange(tokens.shape[1], device=images.device).expand(3, *tokens.shape),
            use_cache=False,
        ).last_hidden_state
        scores: Tensor = self.head(states[torch.arange(len(tokens)), rated].to(self.head[0].weight.dtype))[:, 0]
        return scores


class _SimulatedHPSv3(HPSv3Scorer):
    """Without a tokenizer: every conversation is `TEXT_TOKENS` long, and the image's."""

    reward_token = -1

    def tokenize(self, prompts: Sequence[str], image_tokens: int) -> Tensor:
        tokens = torch.zeros(len(prompts), TEXT_TOKENS + image_tokens, dtype=torch.int64)
        tokens[:, 1 : 1 + image_tokens] = self.model.config.image_token_id
        tokens[:, -1] = self.reward_token
        return tokens


def _published_tensors(file: Path) -> dict[str, Tensor]:
    """Those in ``file`` by the names that transformers gave them before 4.52, without those that write text."""
    newer = re.compile(r"^model\.(?:language_(?=model\.)|(?=visual\.))")
    tensors = {newer.sub("", name): value for name, value in read_tensors(file).items()}
    return {name: value for name, value in tensors.items() if name != "lm_head.weight"}


def _networks(
    config: Qwen2VLConfig, tensors: Mapping[str, Tensor], file: Path, dtype: torch.dtype
) -> tuple[Qwen2VLModel, nn.Sequential]:
    """Qwen2-VL without the layer that writes text, and the head. Raises UserError where ``tensors`` do not fit."""
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in Qwen2VLModel(config).state_dict().items()}
    head = _head(config.text_config.hidden_size)
    names = {re.sub(r"^language_model\.", "model.", name): name for name in shapes}
    heads = {f"rm_head.{name}": name for name in head.state_dict()}
    check_fit(
        {key: shapes[name] for key, name in names.items()}
        | {key: head.state_dict()[name].shape for key, name in heads.items()},
        tensors,
        file,
    )
    head.load_state_dict({name: tensors[key] for key, name in heads.items()})
    # Takes the tensors as they are: a copy of 7 billion weights would not fit many machines.
    model = Qwen2VLModel.from_pretrained(
        None, config=config, state_dict={name: tensors[key] for key, name in names.items()}, dtype=dtype
    )
    return model, head


def _head(width: int) -> nn.Sequential:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for name, outputs in HEAD.items():
        layers[name] = nn.Linear(width, outputs)
        layers[f"relu_{name}"] = nn.ReLU()
        width = outputs
    layers.popitem()
    return nn.Sequential(layers)


def _fuse(model: Qwen2VLModel) -> None:
    """Has norms and gated layers run as Liger's Triton kernels.

    Module by module: Liger's own patch of Qwen2-VL fails on transformers 5.23, and reaches models that are not ours.
    """
    from liger_kernel.transformers import functional as liger

    def rms_norm(norm: Any, x: Tensor) -> Any:
        return liger.liger_rms_norm(x, norm.weight, norm.variance_epsilon, in_place=False)

    def layer_norm(norm: Any, x: Tensor) -> Any:
        return liger.liger_layer_norm(x, norm.weight, norm.bias, norm.eps)

    def gated(mlp: Any, x: Tensor) -> Any:
        return mlp.down_proj(liger.liger_swiglu(mlp.gate_proj(x), mlp.up_proj(x)))

    fused = {"Qwen2VLRMSNorm": rms_norm, "LayerNorm": layer_norm, "Qwen2MLP": gated}
    for module in model.modules():
        if type(module).__name__ in fused:
            module.forward = partial(fused[type(module).__name__], module)
