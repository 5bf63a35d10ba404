from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import BACKENDS
from leap_kernels import stochastic_round_, use_backend
from leap_kernels.stochastic_round import philox, random_bits
from torch import Tensor


def rounded(src: Tensor, seed: int = 7, offset: int = 0) -> Tensor:
    return stochastic_round_(torch.empty_like(src, dtype=torch.bfloat16), src, seed, offset)


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int16)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0,) * 4, (0,) * 2, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
        ),
    ],
)
def test_generator_gives_the_published_test_vectors(counter, key, expected) -> None:
    words = philox(tuple(torch.tensor([word]) for word in counter), key)
    assert tuple(word.item() for word in words) == expected


@pytest.mark.parametrize("base", [1.0, -1.0, 3e-3, -1e30, 1e-39], ids=str)
def test_unbiased(base: float) -> None:
    """The share rounded up equals the distance to the lower neighbour, within five standard errors."""
    low = torch.tensor(base, dtype=torch.bfloat16)
    high = (bits(low) + 1).view(torch.bfloat16)
    draws = 40_000
    for share in (1 / 256, 0.3, 0.5, 0.9):
        value = low.double() + share * (high.double() - low.double())
        src = torch.full((draws,), value.item())
        exact_share = ((src[0].double() - low.double()) / (high.double() - low.double())).item()
        result = rounded(src, seed=11, offset=round(1e6 * share))
        up = bits(result) == bits(high)
        assert (up | (bits(result) == bits(low))).all()
        error = (exact_share * (1 - exact_share) / draws) ** 0.5
        assert abs(up.double().mean().item() - exact_share) < 5 * error


def test_unbiased_on_a_spread_of_values() -> None:
    src = torch.randn(2000)
    total = torch.zeros(2000, dtype=torch.float64)
    repeats = 400
    for repeat in range(repeats):
        total += rounded(src, seed=3, offset=repeat * 2000).double()
    spacing = (src.abs() * 2**-7).double()
    # A draw's variance is at most spacing^2 / 4; the mean over all elements is a far sharper test than each.
    z = (total / repeats - src.double()) / (spacing / (2 * repeats**0.5))
    assert z.abs().max() < 5
    assert z.mean().abs() < 4 / 2000**0.5


def test_exact_values_inf_and_nan_stay() -> None:
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    for seed in range(3):
        result = rounded(every.float(), seed=seed)
        numbers = ~every.isnan()
        assert torch.equal(bits(result)[numbers], bits(every)[numbers])
        assert result[~numbers].isnan().all()


def test_nan_with_a_payload_in_the_lost_bits_stays_nan() -> None:
    src = torch.tensor([0x7F800001, 0x7FFFFFFF, 0x7F80FFFF], dtype=torch.int32).view(torch.float32)
    assert rounded(src).isnan().all()


def test_finite_values_stay_finite() -> None:
    src = torch.tensor([3.4e38, -3.4e38, torch.finfo(torch.float32).max]).repeat(1000)
    largest = torch.finfo(torch.bfloat16).max
    assert rounded(src).float().abs().eq(largest).all()


words = st.lists(st.integers(0, (1 << 32) - 1), min_size=1, max_size=40)
seeds = st.integers(0, (1 << 64) - 1)
offsets = st.integers(0, (1 << 63) - 40)


@pytest.mark.parametrize("backend", BACKENDS[1:])
@given(words=words, repeats=st.sampled_from([1, 300]), seed=seeds, offset=offsets)
def test_same_bits_on_every_backend(backend: str, words: list[int], repeats: int, seed: int, offset: int) -> None:
    """Of any float at all, NaN included."""
    offset = min(offset, (1 << 63) - len(words) * repeats)
    src = torch.tensor(words, dtype=torch.int64).to(torch.int32).view(torch.float32).repeat(repeats)
    with use_backend("reference"):
        expected = rounded(src, seed, offset)
    with use_backend(backend, strict=True):
        assert torch.equal(bits(rounded(src, seed, offset)), bits(expected))


@pytest.mark.parametrize("backend", BACKENDS)
@given(cut=st.integers(1, 2100), offset=st.integers(0, 20))
def test_same_bits_wherever_a_tensor_is_cut(backend: str, cut: int, offset: int) -> None:
    src = torch.linspace(-3, 3, 2101)
    with use_backend(backend, strict=True):
        whole = rounded(src, seed=5, offset=offset)
        parts = torch.cat([rounded(src[:cut], 5, offset), rounded(src[cut:], 5, offset + cut)])
    assert torch.equal(bits(whole), bits(parts))


def test_bits_are_those_of_the_documented_positions() -> None:
    expected = [number for counter in (0, 1) for number in _numbers_of(counter)]
    assert random_bits(16, 7, 0, torch.device("cpu")).tolist() == expected
    assert random_bits(5, 7, 6, torch.device("cpu")).tolist() == expected[6:11]


def _numbers_of(counter: int) -> list[int]:
    """Return the eight numbers of a counter, with Python's integers."""
    c, k = [counter & 0xFFFFFFFF, counter >> 32, 0, 0], [7, 0]
    for _ in range(7):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return [half for word in c for half in (word & 0xFFFF, word >> 16)]


@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_pieces_of_a_large_tensor_continue_the_counter(backend: str) -> None:
    src = torch.full(((1 << 18) + 1000,), 1.001)
    with use_backend(backend, strict=True):
        whole = rounded(src, seed=5)
        assert torch.equal(bits(whole[-1500:]), bits(rounded(src[-1500:], 5, (1 << 18) - 500)))
        threads = torch.get_num_threads()
        torch.set_num_threads(3)
        again = rounded(src, seed=5)
        torch.set_num_threads(threads)
    assert torch.equal(bits(again), bits(whole))


def test_seed_and_offset_matter() -> None:
    src = torch.full((4096,), 1.0 + 2**-8)
    base = rounded(src, seed=1, offset=0)
    # High words count too: the counter and the key are 64 bits wide.
    for seed, offset in ((2, 0), (1 + (1 << 32), 0), (1, 4096), (1, 1 << 32)):
        same = (rounded(src, seed, offset) == base).double().mean().item()
        assert 0.4 < same < 0.6


def test_strided_tensors_count_in_row_major_order() -> None:
    src = torch.randn(6, 5)
    expected = rounded(src)
    assert torch.equal(bits(rounded(src.t().contiguous().t())), bits(expected))
    dst = torch.zeros(5, 6, dtype=torch.bfloat16).t()
    assert stochastic_round_(dst, src, 7, 0) is dst
    assert torch.equal(bits(dst), bits(expected))


def test_empty_tensor() -> None:
    assert rounded(torch.zeros(0, 3)).shape == (0, 3)


def test_moves_weights_that_rounding_to_nearest_would_not() -> None:
    """An update of 1e-5 on a weight of 0.03 is far below half a bfloat16 step: on average it must arrive."""
    weight = torch.full((50_000,), 0.03, dtype=torch.bfloat16)
    wanted = weight.float() - 1e-5
    assert torch.equal(wanted.to(torch.bfloat16), weight)
    moved = (rounded(wanted).double() - weight.double()).mean().item()
    assert moved == pytest.approx(-1e-5, rel=0.1)


@pytest.mark.parametrize(
    ("dst", "src", "seed", "offset", "message"),
    [
        (torch.zeros(2), torch.zeros(2), 0, 0, "float32 to bfloat16"),
        (torch.zeros(2).bfloat16(), torch.zeros(2).double(), 0, 0, "float32 to bfloat16"),
        (torch.zeros(2).bfloat16(), torch.zeros(3), 0, 0, "alike"),
        (torch.zeros(1).bfloat16().expand(2), torch.zeros(2), 0, 0, "expanded"),
        (torch.zeros(2).bfloat16(), torch.zeros(2), -1, 0, "seed"),
        (torch.zeros(2).bfloat16(), torch.zeros(2), 1 << 64, 0, "seed"),
        (torch.zeros(2).bfloat16(), torch.zeros(2), 0, -1, "offset"),
        (torch.zeros(2).bfloat16(), torch.zeros(2), 0, (1 << 63) - 1, "offset"),
    ],
)
def test_wrong_arguments_are_named(dst, src, seed, offset, message) -> None:
    with pytest.raises(ValueError, match=message):
        stochastic_round_(dst, src, seed, offset)
