"""Prompts that a reward cuts are counted: from the first word on that its score does not depend on."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from chat_folders import byte_tokenizer
from reward_cases import PlainClip, bytes_tokenizer
from torch import nn
from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from leapalign.inputs.prompt_limits import warn_of_cut
from leapalign.rewards import get_reward
from leapalign.rewards.hpsv3 import HPSv3Scorer
from leapalign.rewards.hpsv3_prompt import IMAGE_TOKEN, REWARD_TOKEN
from leapalign.rewards.imagereward import ImageRewardScorer
from leapalign.tiny.model import MAX_TOKENS
from leapalign.tiny.train_reward import build_scorer, save_scorer


def clip(name: str) -> Callable[[Path], Any]:
    def load(folder: Path) -> Any:
        save_scorer(build_scorer(), folder)
        return get_reward(name, path=str(folder))

    return load


def hpsv2(folder: Path) -> Any:
    torch.save({"state_dict": PlainClip().state_dict()}, folder / "HPS_v2.1_compressed.pt")
    bytes_tokenizer(folder / "tokenizer")
    return get_reward("hpsv2", path=str(folder), processor=str(folder / "tokenizer"))


def imagereward(folder: Path) -> ImageRewardScorer:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "circle"]
    shared = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = BlipVisionConfig(**shared, image_size=32, patch_size=16)
    text = BlipTextConfig(**shared, vocab_size=len(words), encoder_hidden_size=16, is_decoder=True)
    layers = [(f"{i}", nn.Linear(*pair)) for i, pair in enumerate(pairwise((16, 8, 1)))]
    return ImageRewardScorer(
        BlipVisionModel(vision),
        BlipTextModel(text, add_pooling_layer=False),
        nn.Sequential(OrderedDict(layers)),
        BertTokenizer(vocab={word: index for index, word in enumerate(words)}),
        "raw",
    )


class Case(NamedTuple):
    """A reward, a ``word`` that is one token, and how many ``words`` make a prompt of the limit, ``tokens``."""

    load: Callable[[Path], Any]
    word: str
    words: int
    tokens: int


CASES = {
    "pickscore": Case(clip("pickscore"), "circle ", MAX_TOKENS - 1, MAX_TOKENS),
    "clipscore": Case(clip("clipscore"), "circle ", MAX_TOKENS - 1, MAX_TOKENS),
    # Five letters that HTML has for one.
    "hpsv2": Case(hpsv2, "&amp; ", 75, 77),
    "imagereward": Case(imagereward, "circle ", 33, 35),
}


@pytest.mark.parametrize("name", CASES)
def test_a_prompt_of_the_limit_is_whole_and_the_next_word_is_not(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    case = CASES[name]
    reward, images = case.load(tmp_path), torch.rand(1, 3, 32, 32)
    shorter, whole, longer = ((case.word * (case.words + more)).strip() for more in (-1, 0, 1))
    with torch.no_grad():
        before, last, more = (reward(images, [prompt]) for prompt in (shorter, whole, longer))
    assert torch.equal(last, more)
    assert not torch.equal(before, last)
    caplog.clear()  # of what transformers has to say
    warn_of_cut([(f"reward {name}", reward)], lambda: [shorter, whole])
    assert not caplog.messages
    warn_of_cut([(f"reward {name}", reward)], lambda: [shorter, whole, longer])
    (message,) = caplog.messages
    assert message.startswith(f"reward {name} cuts 1 of 3 prompts at {case.tokens} tokens, as '{longer[:20]}")


def brightness(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    return images.mean(dim=(1, 2, 3))


def test_a_reward_without_a_limit_is_not_spoken_of(caplog: pytest.LogCaptureFixture) -> None:
    warn_of_cut([("reward custom", brightness)], lambda: pytest.fail("read for nothing"))
    assert not caplog.messages


def test_hpsv3_cuts_nothing() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([IMAGE_TOKEN, REWARD_TOKEN], special_tokens=True)
    scorer = SimpleNamespace(tokenizer=tokenizer)
    prompt = "circle " * 3000 + "left of a square"
    (tokens,) = HPSv3Scorer.tokenize(scorer, [prompt], 1)  # type: ignore[arg-type]
    assert prompt in tokenizer.decode(tokens)
    assert not hasattr(HPSv3Scorer, "prompt_limit")
