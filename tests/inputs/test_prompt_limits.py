from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import pytest

from leapalign.inputs.prompt_limits import MOST_COUNTED, PromptLimit, warn_of_cut

ASKED: list[str] = []


def words(prompts: Sequence[str]) -> list[int]:
    ASKED.extend(prompts)
    return [len(prompt.split()) for prompt in prompts]


FOUR_WORDS = SimpleNamespace(prompt_limit=PromptLimit(4, words))


@pytest.fixture(autouse=True)
def _nothing_asked() -> None:
    ASKED.clear()


def test_the_line_says_who_how_many_and_one_of_them(caplog: pytest.LogCaptureFixture) -> None:
    prompts = ["a", "a b c d", "a b c d\ne " + "f" * 100, "a b c d e f"] * 100
    readers = [("reward one", FOUR_WORDS), ("reward two", SimpleNamespace(prompt_limit=PromptLimit(5, words)))]
    warn_of_cut(readers, lambda: prompts, "watch.prompts")
    example = "'a b c d\\ne " + "f" * 67 + "...'"
    assert caplog.messages == [
        f"reward one cuts 200 of 400 watch.prompts at 4 tokens, as {example}",
        f"reward two cuts 200 of 400 watch.prompts at 5 tokens, as {example}",
    ]


def test_of_very_many_prompts_the_longest_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    short, long, longest = ["a b"] * 50_000, ["a b c d e"] * 3, ["a b c d e f"] * (MOST_COUNTED - 1)
    warn_of_cut([("reward", FOUR_WORDS)], lambda: [*short, *long, *short])
    assert caplog.messages == ["reward cuts at least 3 of 100,003 prompts at 4 tokens, as 'a b c d e'"]
    assert len(ASKED) == MOST_COUNTED
    caplog.clear()
    warn_of_cut([("reward", FOUR_WORDS)], lambda: [*long, *short, *longest])
    assert caplog.messages[0].startswith("reward cuts at least 2,000 of 52,002 prompts at 4 tokens")


def test_nothing_is_said_where_nothing_is_cut(caplog: pytest.LogCaptureFixture) -> None:
    warn_of_cut([("reward", FOUR_WORDS)], lambda: ["a b c d", "a"])
    warn_of_cut([("reward", FOUR_WORDS)], list)
    assert not caplog.messages
