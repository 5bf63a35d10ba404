"""What only a GPU can show. Each test runs on the CPU, too, where its copies are at once: so the tests are tested.

Marked `cuda` and skipped without one. Attention is computed by PyTorch's own formula, which adds in the same order
every time; the others' backward passes do not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from places import BYTES, HOST, STREAMED
from small_runs import PROMPTS, config_of
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from leapalign.config import Config
from leapalign.evaluation.generate import generate
from leapalign.inputs.validation import UserError
from leapalign.memory.host_gradients import HostGradients
from leapalign.memory.placement import place_for_sampling
from leapalign.memory.transfer import Lane, ToHost, pinned
from leapalign.methods import get_method
from leapalign.models import encode_prompts, load_model
from leapalign.planning.ledger import StorageLedger
from leapalign.planning.simulate import simulate
from leapalign.rewards import reward_terms
from leapalign.trainer import Trainer

TWO_BUFFERS = (*STREAMED, "memory.stream_buffers=2")
NATIVE = "memory.attention=native"
MARGIN = 64 << 20
"""Bytes that libraries take on a GPU beyond tensors: cuBLAS' workspaces (32 MiB on H100) and rounding up to 512 bytes
and to 2 MiB; tens of MiB of float64 temporaries in the optimizer's step."""


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    with sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=True, deterministic=True):
        yield torch.device(request.param)


def trainer_on(device: torch.device, config: Config) -> Trainer:
    model, rewards = load_model(config.model), reward_terms(config)
    embeddings = encode_prompts(config.model, PROMPTS)
    return Trainer.assembled(config, model, PROMPTS, embeddings, rewards, get_method(**config.method), device)


def three_iterations(device: torch.device, config: Config) -> tuple[list[Tensor], list[dict[str, float]]]:
    """Weights and metrics after them."""
    trainer = trainer_on(device, config)
    records = []
    for _ in range(3):
        records.append(trainer.train_one())
        trainer.iteration += 1
    with trainer.optimizer.changing_weights():
        return [p.detach().cpu().clone() for p in trainer.model.transformer.parameters()], records


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(a, b, strict=True))


def test_every_place_gives_the_same_run(parts: Path, tmp_path: Path, device: torch.device) -> None:
    """Steps on the host to the bit; the device's own step sums its norm in another order on a GPU."""
    of = {
        name: three_iterations(device, config_of(parts, tmp_path, BYTES, NATIVE, *place))
        for name, place in (("device", ()), ("host", (HOST, "memory.checkpointing=blocks")), ("streamed", STREAMED))
    }
    assert same(of["streamed"][0], of["host"][0])
    assert of["streamed"][1] == of["host"][1]
    for own, host in zip(of["device"][1], of["host"][1], strict=True):
        assert own["reward"] == pytest.approx(host["reward"], rel=2e-3)
        assert own["grad_norm"] == pytest.approx(host["grad_norm"], rel=0.05)


@contextlib.contextmanager
def sleeping(device: torch.device, monkeypatch: pytest.MonkeyPatch, copies: int, blocks: int) -> Iterator[None]:
    """Within the block a GPU sleeps for so many cycles before each copy beside its work, and before each linear map."""
    start, linear = Lane.copy, nn.Linear.forward

    def slow_copy(lane: Lane, target: Tensor, source: Tensor, after: object) -> object:
        if device.type == "cuda":
            with torch.cuda.stream(lane._stream):
                torch.cuda._sleep(copies)
        return start(lane, target, source, after)

    def slow_linear(module: nn.Linear, x: Tensor) -> Tensor:
        if x.is_cuda:
            torch.cuda._sleep(blocks)
        return linear(module, x)

    with monkeypatch.context() as patch:
        patch.setattr(Lane, "copy", slow_copy)
        patch.setattr(nn.Linear, "forward", slow_linear)
        yield


@pytest.mark.parametrize("place", [(HOST,), TWO_BUFFERS])
@pytest.mark.parametrize(("copies", "blocks"), [(2_000_000, 0), (0, 200_000)])
def test_slow_copies_and_slow_blocks_give_the_same_run(
    parts: Path,
    tmp_path: Path,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    place: tuple[str, ...],
    copies: int,
    blocks: int,
) -> None:
    """Copies behind the computation are waited for; copies ahead of it do not overwrite what it reads."""
    config = config_of(parts, tmp_path, BYTES, NATIVE, *place)
    plain = three_iterations(device, config)
    with sleeping(device, monkeypatch, copies, blocks):
        slow = three_iterations(device, config)
    assert same(plain[0], slow[0])
    assert plain[1] == slow[1]


def test_a_copy_runs_beside_the_devices_work(device: torch.device) -> None:
    lane, size = Lane(device), 1 << 20
    source, target = pinned(size, torch.zeros(1), device).fill_(1), torch.zeros(size, device=device)
    before = lane.mark()
    if device.type == "cuda":
        torch.cuda._sleep(2_000_000_000)
    arrived = lane.copy(target, source, after=before)
    arrived.synchronize()
    if device.type == "cuda":
        assert not torch.cuda.current_stream().query(), "the copy had to wait for work that it does not need"
    assert float(target.sum()) == size


def test_gradient_sums_are_exact(device: torch.device) -> None:
    """The device is busy, the caller reuses its memory at once, and each sum is that of adding one by one."""
    parameters = [nn.Parameter(torch.zeros(n, 64, dtype=torch.bfloat16, device=device)) for n in (4096, 16, 512)]
    held = HostGradients(parameters, device)
    expected = [torch.zeros(p.shape) for p in parameters]
    for _ in range(8):
        for parameter, total in zip(parameters, expected, strict=True):
            gradient = torch.randn(parameter.shape).bfloat16()
            total += gradient
            on_device = gradient.to(device)
            if device.type == "cuda":
                torch.cuda._sleep(1_000_000)
            held.add(parameter, on_device * 1)
    held.wait()
    assert all(torch.equal(held[p], total) for p, total in zip(parameters, expected, strict=True))


def test_what_a_gpu_writes_to_host_memory_is_pinned(device: torch.device) -> None:
    memory = pinned(1000, torch.zeros(1), device)
    assert memory.is_pinned() == (device.type == "cuda")
    way = ToHost(device, [torch.zeros(1000)])
    seen: list[Tensor] = []
    way.send(torch.ones(1000, device=device), lambda values: seen.append(values.clone()))
    way.wait()
    assert float(seen[0].sum()) == 1000


@pytest.mark.cuda
def test_after_memory_that_cannot_be_pinned_the_gpu_works_on(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = torch.cuda.cudart()

    class OfNoSize:
        def cudaHostRegister(self, address: int, _: int, flags: int) -> int:
            return int(runtime.cudaHostRegister(address, 0, flags))

    monkeypatch.setattr(torch.cuda, "cudart", OfNoSize)
    with pytest.raises(UserError, match="cannot be pinned"):
        pinned(10, torch.zeros(1), torch.device("cuda"))
    assert float(torch.ones(3, device="cuda").sum()) == 3


@pytest.mark.slow
@pytest.mark.parametrize("place", [(), STREAMED])
def test_peaks_are_the_simulated_ones(
    parts: Path, tmp_path: Path, device: torch.device, place: tuple[str, ...]
) -> None:
    """Within `MARGIN` on a GPU. On a CPU the ledger counts, and leaves out what came from files."""
    config = config_of(parts, tmp_path, BYTES, NATIVE, *place, "train.batch_size=8")
    expected = simulate(config).device_peak
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        trainer_on(device, config).train_one()
        measured = torch.cuda.max_memory_allocated() - before
        assert expected * 0.9 - MARGIN <= measured <= expected * 1.1 + MARGIN
    else:
        with StorageLedger() as ledger:
            trainer_on(device, config).train_one()
        assert 0.3 * expected < ledger.peak <= 1.1 * expected


@pytest.mark.parametrize("streamed", [False, True])
def test_generating_on_the_device(parts: Path, tmp_path: Path, device: torch.device, streamed: bool) -> None:
    config = config_of(parts, tmp_path, BYTES, NATIVE, *(STREAMED if streamed else ()))
    model, embeddings = load_model(config.model), encode_prompts(config.model, PROMPTS)
    expected = generate(model, embeddings, range(5), 3, batch_size=2)
    place_for_sampling(model, config.memory, device)
    images = generate(model, embeddings, range(5), 3, batch_size=2)
    torch.testing.assert_close(images, expected, rtol=1e-3, atol=1e-3)
    rewards = reward_terms(config)[0].reward.to(device)(images, PROMPTS)
    assert rewards.device.type == device.type
    assert rewards.shape == (5,)


def test_a_checkpoint_is_resumed_on_the_device(parts: Path, tmp_path: Path, device: torch.device) -> None:
    config = config_of(parts, tmp_path, BYTES, NATIVE)
    whole, again = trainer_on(device, config), trainer_on(device, config)
    whole.train_one()
    optimizer = whole.optimizer
    saved = {name: value.cpu().clone() for name, value in optimizer.tensors().items()}
    again.optimizer.load(saved, optimizer.scalars(), [average.clone() for average in optimizer.average.tensors])
    with torch.no_grad():
        for new, old in zip(again.model.transformer.parameters(), whole.model.transformer.parameters(), strict=True):
            new.copy_(old)
    whole.iteration = again.iteration = 1
    assert whole.train_one() == again.train_one()
