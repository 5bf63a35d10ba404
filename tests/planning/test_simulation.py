"""A simulated iteration needs what the real one needs, to the byte or nearly."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from measured_iterations import measured
from places import BYTES, HOST, PLACES
from screens import stderr_on_a_terminal
from small_runs import config_of
from tiers import some_slow
from watched_runs import other_reward, watched

from leapalign import cli
from leapalign.inputs.validation import UserError
from leapalign.planning import simulate as simulation
from leapalign.planning.caching_allocator import Event, reserved
from leapalign.planning.fit import parse_size
from leapalign.planning.ledger import StorageLedger
from leapalign.planning.simulate import BETWEEN, ITERATION, run_hours, simulate, step_seconds

FACTORS = "optimizer.name=adafactor"
MOMENTS = "optimizer.name=adamw"
HOSTED = "host optimizer"
PAGE = 20 * 2**20
"""Bytes by which the allocator's memory for larger blocks grows."""


@pytest.mark.parametrize(
    ("optimizer", "place"),
    [
        *some_slow(
            [
                *((BYTES, place) for place in ("plain", *PLACES)),
                (FACTORS, "plain"),
                (FACTORS, HOSTED),
                (MOMENTS, "plain"),
            ],
            [(BYTES, "streamed, a sample at a time")],
        ),
        pytest.param("optimizer.name=bnb_adamw_8bit", "plain", marks=pytest.mark.bitsandbytes),
    ],
)
def test_simulated_peaks_are_the_real_ones(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str, place: str
) -> None:
    asked = (*PLACES.get(place, ()), "train.batch_size=8", "watch.seeds=2", other_reward(parts))
    config = watched(parts, tmp_path / "run", optimizer, *asked)
    seen: list[list[Event]] = []
    monkeypatch.setattr(simulation, "reserved", lambda events: seen.append(events) or reserved(events))
    real, found = measured(config), simulate(config)
    assert most_alive(seen[0]) == pytest.approx(found.device_peak, rel=0.005)
    assert most_alive(real.events) == pytest.approx(real.peak, rel=0.005)
    assert found.reserved == pytest.approx(reserved(real.events), abs=PAGE)
    assert set(found.device) == {*ITERATION, *BETWEEN}
    for simulated, counted in ((found.device, real.device.peaks), (found.host, real.host.peaks)):
        for stage in (*ITERATION, *BETWEEN):
            expected = counted[stage].total if stage in counted else 0
            if stage == "saving" and simulated is found.host and config.memory.optimizer == "device":
                expected += saved_from_the_device(real)
            assert (simulated[stage].total if stage in simulated else 0) == pytest.approx(expected, rel=0.005), stage


def most_alive(events: Sequence[Event]) -> int:
    alive: dict[int, int] = {}
    total = most = 0
    for storage, size in events:
        total += size or -alive.pop(storage)
        if size:
            alive[storage] = size
        most = max(most, total)
    return most


def saved_from_the_device(real: StorageLedger) -> int:
    """Bytes of the largest file that are copied to host memory: here they never leave it, and nothing is counted."""
    by_role = real.device.peaks["saving"].by_role
    return max(by_role["weights"], by_role.get("optimizer", 0))


@pytest.mark.slow
def test_an_average_of_another_dtype_is_rounded_to_a_copy(parts: Path, tmp_path: Path) -> None:
    """Which samples, the watch and checkpoints each make."""
    kinds = {dtype: ("model.dtype=bfloat16", f"ema.dtype={dtype}") for dtype in ("bfloat16", "float32")}
    same, other = (simulate(watched(parts, tmp_path / dtype, BYTES, HOST, *kind)).host for dtype, kind in kinds.items())
    weights = same["optimizer"].by_role["weights"]
    for stage in BETWEEN:
        # The average itself takes twice the bytes.
        assert other[stage].total - same[stage].total == pytest.approx(2 * weights, rel=0.01)
    assert other["surrogate"].total - same["surrogate"].total == pytest.approx(weights, rel=0.01)


def test_without_samples_and_watch_there_are_no_such_stages(parts: Path, tmp_path: Path) -> None:
    found = simulate(config_of(parts, tmp_path, BYTES, "samples.every=0"))
    assert set(found.device) == {*ITERATION, "saving"}


def test_a_bar_says_which_stage_is_simulated(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = stderr_on_a_terminal(monkeypatch)
    simulate(config_of(parts, tmp_path, BYTES))
    assert {"simulate, model", *(f"simulate, {stage}" for stage in ITERATION)} <= terminal.descriptions()


@pytest.mark.slow
def test_host_memory_holds_what_leaves_the_device(parts: Path, tmp_path: Path) -> None:
    plain = simulate(config_of(parts, tmp_path, BYTES))
    host = simulate(config_of(parts, tmp_path, BYTES, "memory.optimizer=host"))
    streamed = simulate(config_of(parts, tmp_path, BYTES, *PLACES["streamed through two buffers"]))
    size = 4 * plain.trainable_parameters
    weights = {
        name: found.device["optimizer"].by_role["weights"]
        for name, found in (("plain", plain), ("host", host), ("streamed", streamed))
    }
    assert weights["plain"] == weights["host"] == size
    assert weights["streamed"] < 0.75 * size
    assert "gradients" not in host.device["optimizer"].by_role
    held = host.host["optimizer"].by_role
    assert held["weights"] == size
    assert size < held["gradients"] < 1.5 * size, "the sums, and what gradients pass through"
    assert {way for _, way in plain.traffic} == {"on_host", "on_device"}, "the average, and the model"
    assert host.traffic["surrogate", "to_host"] > 0
    assert streamed.traffic["rollout", "to_device"] > host.traffic.get(("rollout", "to_device"), 0)


@pytest.mark.parametrize("ema", some_slow(["float32", "bfloat16"], ["bfloat16"]))
def test_the_hosts_work_is_counted_by_hand(parts: Path, tmp_path: Path, ema: str) -> None:
    """Bytes a weight in float32. Of two rollouts each micro-batch adds to the sums once."""
    asked = (BYTES, HOST, f"ema.dtype={ema}", "train.batch_size=8", "train.microbatch=2")
    found = simulate(config_of(parts, tmp_path, *asked))
    count = found.trainable_parameters
    backward_passes = 2 * 2 * 2  # rollouts, micro-batches of each, leaps
    assert found.traffic["surrogate", "on_host"] == pytest.approx(backward_passes * 12 * count, rel=0.01)
    average = 2 * 4 + 4 if ema == "float32" else 2 * 2 + 4 + 16
    step = 2 * 4 + 2 * (4 + 2) + 4  # gradients twice, weights and moments both ways, the sums cleared
    assert found.traffic["optimizer", "on_host"] == pytest.approx((step + average) * count, rel=0.02)
    assert step_seconds(found, "H100")["optimizer"]["host"] == found.traffic["optimizer", "on_host"] / 100e9
    plain = simulate(config_of(parts, tmp_path, BYTES, f"ema.dtype={ema}"))
    on_host = {key: size for key, size in plain.traffic.items() if key[1] == "on_host"}
    assert on_host == {("optimizer", "on_host"): pytest.approx(average * count, rel=0.01)}
    assert found.traffic["optimizer", "on_device"] == pytest.approx(2 * 4 * count, rel=0.01), "weights come back"
    assert plain.traffic["optimizer", "on_device"] > 16 * count, "the step"


def test_a_run_takes_what_each_stage_waits_for_longest(parts: Path, tmp_path: Path) -> None:
    found = simulate(config_of(parts, tmp_path, BYTES, HOST, "train.batch_size=4"))
    seconds = step_seconds(found, "H100")
    assert seconds["optimizer"]["host"] > seconds["optimizer"]["compute"] + seconds["optimizer"]["memory"]
    kernels = sum(
        of["compute"] + of["memory"] for name, of in seconds.items() if name not in ("optimizer", "surrogate")
    )
    host = seconds["optimizer"]["host"] + seconds["surrogate"]["host"]
    assert run_hours(found, "H100", 7200) == pytest.approx(2 * (kernels + host))


def test_the_devices_work_is_what_no_product_does(parts: Path, tmp_path: Path) -> None:
    small = ("train.batch_size=4", "samples.every=0")
    plain, patched = (
        simulate(config_of(parts, tmp_path, BYTES, *small, f"kernels.patch={on}")) for on in ("false", "true")
    )
    assert plain.flops == patched.flops
    for stage in ("rollout", "surrogate"):
        moved = [found.traffic[stage, "on_device"] for found in (plain, patched)]
        assert moved[1] < 0.75 * moved[0]
        assert step_seconds(plain, "H100")[stage]["memory"] == moved[0] / 3.35e12


def test_command_says_what_fits_and_what_to_change(
    parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(f"model: {{path: {parts / 'model'}}}\nreward: {{name: pickscore, path: {parts / 'reward'}}}\n")
    asked = ["memory", "--config", str(config), "--json", "rollout.num_steps=3", "rollout.batch_size=4"]
    assert cli.main([*asked, "--gpu-memory", "2GiB"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["fits"] is True
    assert found["advice"] is None
    assert set(found["stages"]) == {*ITERATION, "sampling", "saving"}
    for stage in found["stages"].values():
        assert sum(stage["by_role"].values()) == stage["device_peak_bytes"]
    assert max(stage["device_peak_bytes"] for stage in found["stages"].values()) == found["device_peak_bytes"]
    assert found["flops"]["surrogate"] > found["flops"]["optimizer"]
    assert cli.main([*asked, "--gpu-memory", "1MB"]) == 0
    assert "To fit: take another card: driver, context and libraries alone need 1.12 GiB" in capsys.readouterr().out
    assert cli.main([*asked, "--gpu-memory", "1.15GiB"]) == 0
    printed = capsys.readouterr().out
    assert "does not fit" in printed
    assert "To fit: set train.reward_chunk to 1: the reward stage is the largest" in printed
    assert cli.main([*asked, "--gpu-memory", "much"]) == 2


@pytest.mark.parametrize(("text", "size"), [("80GiB", 80 * 2**30), ("24 GB", 24 * 10**9), ("1.5gib", 3 * 2**29)])
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "80", "GiB", "-1GB", "1.2.3GB", "8TB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UserError, match="write 80GiB"):
        parse_size(text)


def test_a_method_that_the_steps_do_not_suffice_for_is_refused_as_in_training(parts: Path, tmp_path: Path) -> None:
    method = "method={name: leapalign, index_range: [2, 9]}"
    config = config_of(parts, tmp_path, "rollout.num_steps=4", method)
    with pytest.raises(UserError, match=r"method: index_range \[2, 9\] is not a range of the steps 0 to 3"):
        simulate(config)
