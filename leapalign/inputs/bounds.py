"""Types of numbers in configs, methods and rewards, with the bounds that pydantic holds them to."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

# Above these bounds nothing works any more; they keep a slip of the finger from filling the memory.
PositiveInt = Annotated[int, Field(ge=1, le=10**9)]
NonNegativeInt = Annotated[int, Field(ge=0, le=10**9)]
Steps = Annotated[int, Field(ge=1, le=1000)]
Images = Annotated[int, Field(ge=1, le=2**16)]
Pixels = Annotated[int, Field(ge=1, le=2**14)]
PositiveFloat = Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]
FiniteFloat = Annotated[float, Field(ge=-1e9, le=1e9, allow_inf_nan=False)]
Decay = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
