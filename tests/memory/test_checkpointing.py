"""Recomputing blocks changes the memory, not the gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from small_models import small_flux, small_vae
from torch import Tensor, nn
from worlds import flux_embeddings

from leapalign.config import MemoryConfig
from leapalign.inputs.validation import UserError
from leapalign.memory.attention import set_attention
from leapalign.memory.checkpointing import checkpoint_blocks, prepare_model
from leapalign.models.flux import FluxModel
from leapalign.planning.ledger import StorageLedger
from leapalign.tiny.model import build_scheduler

BATCH = 4


def gradients(**config: Any) -> tuple[Tensor, int]:
    """Gradients of a FLUX of three double and three single blocks, and the peak of activations."""
    torch.manual_seed(0)
    transformer = small_flux(num_layers=3, num_single_layers=3, attention_head_dim=32, axes_dims_rope=(8, 12, 12))
    model = FluxModel(transformer, build_scheduler(), 128, 128, small_vae())
    prepare_model(model.transformer, model.decoder, MemoryConfig(**config))
    latents, embeddings = torch.randn(BATCH, 64, 16), flux_embeddings(BATCH)
    with StorageLedger() as ledger:
        ledger.exclude(*transformer.parameters(), latents, *embeddings.tensors())
        velocity = model.velocity(latents, torch.full((BATCH,), 0.5), embeddings)
        kept = ledger.live
        velocity.sum().backward()
    return torch.cat([p.grad.flatten() for p in transformer.parameters() if p.grad is not None]), kept


def test_gradients_are_those_without_and_memory_falls_with_what_is_recomputed() -> None:
    plain, most = gradients()
    kept = {}
    for checkpointing, every in (("blocks", 1), ("attention", 1), ("blocks", 2)):
        found, kept[checkpointing, every] = gradients(checkpointing=checkpointing, checkpoint_every=every)
        torch.testing.assert_close(found, plain, rtol=0, atol=0)
    assert kept["blocks", 1] < kept["attention", 1] < kept["blocks", 2] < most
    assert kept["blocks", 1] < 0.2 * most
    # Half of the blocks recomputed: about half of what recomputing all saves.
    saved = (most - kept["blocks", 2]) / (most - kept["blocks", 1])
    assert 0.35 < saved < 0.65


def test_decoder_recomputes_too() -> None:
    """A VAE's gradient stays, and its activations halve at least."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 32),
        latent_channels=4,
        layers_per_block=2,
        norm_num_groups=8,
        shift_factor=0.0,
    ).requires_grad_(False)
    transformer = FluxTransformer2DModel(num_layers=1, num_single_layers=0, num_attention_heads=1, in_channels=16)
    model = FluxModel(transformer, build_scheduler(), 64, 64, vae)
    found, kept = [], []
    for recompute in (False, True):
        prepare_model(model.transformer, model.decoder, MemoryConfig(checkpoint_decoder=recompute))
        latents = torch.ones(2, 256, 16, requires_grad=True)
        with StorageLedger() as ledger:
            ledger.exclude(*vae.parameters(), latents)
            images = model.decode(latents)
            kept.append(ledger.live)
            found.append(torch.autograd.grad(images.square().sum(), latents)[0])
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
    assert kept[1] < 0.5 * kept[0]


def test_models_that_cannot_recompute_are_named() -> None:
    with pytest.raises(UserError, match=r"Linear cannot recompute.*memory.checkpointing"):
        checkpoint_blocks(nn.Linear(2, 2))


def test_auto_takes_what_works_and_a_missing_backend_is_an_error() -> None:
    transformer = FluxTransformer2DModel(num_layers=1, num_single_layers=0, num_attention_heads=1)
    cpu = torch.device("cpu")
    assert set_attention(transformer, "auto", cpu, torch.float32) == "native"
    for name, needs in (
        ("flash", "the package flash-attn and an NVIDIA GPU"),
        ("_flash_3", "FlashAttention 3, built from source, and a Hopper GPU"),
        ("xformers", "the package xformers and a GPU"),
    ):
        with pytest.raises(
            UserError, match=rf"memory\.attention '{name}' needs {needs} \((?!'NoneType').*set it to auto"
        ):
            set_attention(transformer, name, cpu, torch.float32)
