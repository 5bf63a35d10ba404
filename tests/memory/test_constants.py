"""Constants that are made where they are used."""

from __future__ import annotations

import pytest
import torch
from device_copies import AWAY, DeviceCopies

from leapalign.memory.constants import made_there

VALUES = (0.48145466, 0.4578275, 1 / 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_they_are_those_of_a_tensor_of_the_values(dtype: torch.dtype) -> None:
    found = made_there(VALUES, torch.zeros(1, dtype=dtype))
    assert found.dtype == dtype
    assert torch.equal(found, torch.tensor(VALUES, dtype=torch.float64).to(dtype))


def test_nothing_is_copied() -> None:
    with DeviceCopies() as counted:
        assert made_there(VALUES, torch.empty(1, device=AWAY)).device == AWAY
        torch.tensor(VALUES, device=AWAY)
    assert counted.all == {"test_constants.py:test_nothing_is_copied": 1}
