"""Copies beside the computation: nothing reads them too early, nothing overwrites what is still read."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from late_streams import LateStreams
from places import BYTES, HOST, STREAMED, stack
from small_runs import config_of, weights
from torch import nn

from leapalign.config import EmaConfig
from leapalign.inputs.validation import UserError
from leapalign.memory import transfer
from leapalign.memory.host_gradients import HostGradients
from leapalign.memory.host_weights import HostWeights
from leapalign.memory.transfer import Background, Lane, ToHost
from leapalign.optimizers.weight_average import WeightAverage
from leapalign.trainer import Trainer

CPU = torch.device("cpu")


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> type[LateStreams]:
    """Copies as late as the code allows."""
    monkeypatch.setattr(torch, "get_device_module", lambda device: LateStreams)
    monkeypatch.setattr(LateStreams, "log", [])
    return LateStreams


def threaded(way: ToHost) -> ToHost:
    """As beside a GPU."""
    way._background = Background(threaded=True)
    return way


@pytest.mark.parametrize("place", [(HOST,), STREAMED, (*STREAMED, "memory.stream_buffers=2")])
def test_late_copies_give_the_same_run(
    parts: Path, tmp_path: Path, late: type[LateStreams], monkeypatch: pytest.MonkeyPatch, place: tuple[str, ...]
) -> None:
    def run() -> tuple[torch.Tensor, list[float]]:
        trainer = Trainer.from_config(config_of(parts, tmp_path, BYTES, *place, "train.iterations=3"))
        norms = [record["grad_norm"] for record in trainer.run()]
        with trainer.optimizer.changing_weights():
            return weights(trainer).clone(), norms

    delayed = run()
    monkeypatch.undo()
    found, norms = run()
    assert torch.equal(found, delayed[0])
    assert norms == delayed[1]


def test_gradients_on_a_slow_thread_are_waited_for(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow(Background):
        def __init__(self, threaded: bool) -> None:
            super().__init__(threaded=True)

        def run(self, function: Callable[..., None], *arguments: Any) -> Future[None]:
            self._thread.submit(time.sleep, 0.005)
            return super().run(function, *arguments)

    def run() -> torch.Tensor:
        trainer = Trainer.from_config(config_of(parts, tmp_path, BYTES, HOST))
        trainer.train_one()
        return weights(trainer)

    plain = run()
    monkeypatch.setattr(transfer, "Background", Slow)
    assert torch.equal(run(), plain)


@pytest.mark.parametrize("buffers", [2, 3, 4])
def test_a_block_is_overwritten_after_its_last_use_and_beside_the_next(
    late: type[LateStreams], monkeypatch: pytest.MonkeyPatch, buffers: int
) -> None:
    """Forwards and backwards. Reading a block's weights is noted with the memory they are read from."""
    model, copies = stack(6), []
    start = Lane.copy

    def noted(lane: Lane, target: torch.Tensor, source: torch.Tensor, after: object) -> object:
        copies.append((target.data_ptr(), after.time, len(late.log)))
        return start(lane, target, source, after)

    def reading(module: nn.Module, *_: object) -> None:
        late.log.append(module.weight.data_ptr())

    HostWeights(model, CPU, buffers)
    monkeypatch.setattr(Lane, "copy", noted)
    for block in model.blocks:
        block.register_forward_hook(reading)
        block.weight.register_post_accumulate_grad_hook(lambda p: late.log.append(p.data_ptr()))
    x = torch.ones(1, 3, requires_grad=True)
    for block in model.blocks:
        block(x.detach())
    for block in model.blocks:
        x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
    x.sum().backward()
    assert len(copies) > 10
    in_time = 0
    for address, after, now in copies:
        reads = [time for time, read in enumerate(late.log[:now]) if read == address]
        assert not reads or max(reads) < after, "a copy may begin while its place is still read"
        in_time += after < now
    if buffers > 2:
        assert in_time > len(copies) / 2, "with a buffer to spare, copies do not wait for the block that runs"


def test_gradients_add_up_on_a_thread_as_without() -> None:
    parameters = [nn.Parameter(torch.zeros(n, 3)) for n in (50, 7)]
    plain, beside = HostGradients(parameters, CPU), HostGradients(parameters, CPU)
    threaded(beside._to_host)
    for _ in range(20):
        for parameter in parameters:
            gradient = torch.randn(parameter.shape)
            plain.add(parameter, gradient.clone())
            beside.add(parameter, gradient)
    beside.wait()
    assert all(torch.equal(plain[parameter], beside[parameter]) for parameter in parameters)
    beside.clear()
    assert all(beside[parameter] is None for parameter in parameters)
    beside.add(parameters[0], torch.ones(50, 3))
    beside.wait()
    assert torch.equal(beside[parameters[0]], torch.ones(50, 3)), "sums begin anew"


def test_what_fails_on_the_thread_is_raised() -> None:
    parameter = nn.Parameter(torch.zeros(4))
    way = threaded(ToHost(CPU, [parameter], buffers=2))

    def fail(values: torch.Tensor) -> None:
        raise RuntimeError("no more memory")

    way.send(parameter.detach(), fail)
    with pytest.raises(RuntimeError, match="no more memory"):
        way.wait()
    way.send(parameter.detach(), lambda values: None)
    with pytest.raises(RuntimeError, match="no more memory"):
        way.send(parameter.detach(), lambda values: None)


def test_the_caller_waits_where_all_buffers_are_full() -> None:
    way = threaded(ToHost(CPU, [torch.zeros(4)], buffers=2))
    go, seen = threading.Event(), []

    def slow(values: torch.Tensor) -> None:
        assert go.wait(10)
        seen.append(values.clone())

    for number in range(2):
        way.send(torch.full((4,), float(number)), slow)
    threading.Timer(0.2, go.set).start()
    way.send(torch.full((4,), 2.0), slow)
    assert len(seen) >= 1, "the third had to wait for the first"
    way.wait()
    assert [float(values[0]) for values in seen] == [0, 1, 2], "in order, none overwritten"


def test_an_average_of_a_devices_weights_is_the_average(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = [nn.Parameter(torch.randn(n).bfloat16()) for n in (300, 40)]
    near, far = (WeightAverage(parameters, EmaConfig(dtype="bfloat16"), seed=1) for _ in range(2))
    far._to_host = threaded(ToHost(CPU, parameters))
    for _ in range(5):
        with torch.no_grad():
            for parameter in parameters:
                parameter.add_(0.1)
        near.update()
        far.update()
    assert all(torch.equal(a, b) for a, b in zip(near.tensors, far.tensors, strict=True))


def test_host_memory_is_pinned_for_gpus_only() -> None:
    memory = transfer.pinned(10, torch.zeros(1, dtype=torch.bfloat16), CPU)
    assert memory.shape == (10,)
    assert memory.dtype == torch.bfloat16


def test_memory_that_cannot_be_pinned_leaves_no_error_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA would report it at the next launch: one is made, and its error ignored."""
    pending: list[str] = []

    class Runtime:
        def cudaHostRegister(self, *_: int) -> int:
            pending.append("out of memory")
            return 2

    def launch(*_: object, **__: object) -> None:
        if pending:
            raise RuntimeError(f"CUDA error: {pending.pop()}")

    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    monkeypatch.setattr(torch, "ones", launch)
    with pytest.raises(UserError, match=r"cannot be pinned for the GPU \(CUDA error 2\)"):
        transfer.pinned(10, torch.zeros(1), torch.device("cuda"))
    assert not pending
