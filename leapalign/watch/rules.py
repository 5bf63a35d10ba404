"""Rules that end a run: a metric of the watch against a number, or against its value at the base."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from leapalign.inputs.validation import UserError

_NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_RULE = re.compile(
    r"(?P<metric>\w+)\s*(?P<sign>[<>])\s*"
    rf"(?:(?P<number>[+-]?\s*{_NUMBER})|(?P<factor>{_NUMBER})?\s*base\s*(?P<shift>[+-]\s*{_NUMBER})?)"
)


@dataclass(frozen=True)
class StopRule:
    """Holds where a metric is below ``factor base + shift``, or above; and where it is no finite number."""

    text: str
    metric: str
    below: bool
    factor: float
    shift: float

    @classmethod
    def parsed(cls, text: str, metrics: Collection[str]) -> StopRule:
        """The rule in ``text``. Raises UserError where it is none, or not of one of ``metrics``."""
        found = _RULE.fullmatch(text.strip())
        if found is None:
            raise UserError(
                f"watch.stop_when '{text}' must read METRIC < NUMBER, METRIC < NUMBER base or METRIC < base - NUMBER, "
                "with < or >"
            )
        if found["metric"] not in metrics:
            raise UserError(
                f"watch.stop_when '{text}': unknown metric '{found['metric']}'; there are {', '.join(metrics)}"
            )
        if found["number"]:
            factor, shift = 0.0, _number(found["number"])
        else:
            factor, shift = _number(found["factor"] or "1"), _number(found["shift"] or "0")
        if found["metric"] == "drift" and factor:
            raise UserError(f"watch.stop_when '{text}': drift is 0 at the base; compare it with a number")
        return cls(text, found["metric"], found["sign"] == "<", factor, shift)

    def holds(self, value: float, base: float) -> bool:
        """For a metric that is ``value`` now and was ``base`` before training."""
        bound = self.factor * base + self.shift
        return not math.isfinite(value) or (value < bound if self.below else value > bound)


def _number(text: str) -> float:
    return float(text.replace(" ", ""))


@dataclass(frozen=True)
class Stop:
    """A rule that held."""

    rule: StopRule
    value: float
    base: float

    def __str__(self) -> str:
        return (
            f"watch.stop_when '{self.rule.text}' holds: {self.rule.metric} is {self.value:.4g}, and was "
            f"{self.base:.4g} at the base"
        )


def first_to_hold(rules: Sequence[StopRule], now: Mapping[str, float], base: Mapping[str, float]) -> Stop | None:
    """The first of ``rules`` that holds for the metrics ``now``, beside those of the ``base``."""
    stops = (Stop(rule, now[rule.metric], base[rule.metric]) for rule in rules)
    return next((stop for stop in stops if stop.rule.holds(stop.value, stop.base)), None)
