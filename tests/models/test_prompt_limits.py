"""Prompts that a text encoder cuts are counted: from the first word on that its embeddings do not depend on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from chat_folders import TOKENS as BYTES
from chat_folders import save_flux2_dev, save_flux2_klein, save_z_image
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from small_runs import make_parts
from tiny_folders import TOKENS, save_qwen_image, save_stable_diffusion_3

from leapalign.config import ModelConfig
from leapalign.models import encoded, text_encoders
from leapalign.models.embeddings import joined
from leapalign.models.text_encoders import LimitedEncoder
from leapalign.tiny.model import MAX_TOKENS

CPU = torch.device("cpu")


class Case(NamedTuple):
    """A text encoder: the ``number``-th of the folder that ``save`` writes, under ``model``.

    ``word`` is one token. A prompt of ``words`` is as long as allowed, ``tokens``; the last ``behind`` of these follow
    its words and are cut first.
    """

    save: Callable[[Path], None]
    number: int
    word: str
    words: int
    tokens: int
    behind: int = 0
    model: str = ""


CASES = {
    "flux clip": Case(make_parts, 0, " circle", MAX_TOKENS - 1, MAX_TOKENS, model="model"),
    "flux t5": Case(make_parts, 1, " circle", MAX_TOKENS - 1, MAX_TOKENS, model="model"),
    "sd3 clip": Case(save_stable_diffusion_3, 0, " red", TOKENS - 2, TOKENS),
    "sd3 t5": Case(save_stable_diffusion_3, 1, " red", TOKENS - 1, TOKENS),
    # <|im_end|>, a line's end, <|im_start|>, assistant, a line's end.
    "qwen image": Case(save_qwen_image, 0, " a", 512 - 5, 512, behind=5),
    # The letter of a role is a token, as each byte is.
    "flux2 klein": Case(save_flux2_klein, 0, "a", BYTES - 7, BYTES, behind=5),
    "flux2 dev": Case(save_flux2_dev, 0, "a", 512 - 6 - len(SYSTEM_MESSAGE), 512, behind=1),
    "z image": Case(save_z_image, 0, "a", BYTES - 5, BYTES, behind=3),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_prompt_of_the_limit_is_whole_and_the_next_word_is_not(case: Case, tmp_path: Path) -> None:
    case.save(tmp_path)
    encode = list(text_encoders(ModelConfig(path=str(tmp_path / case.model)), CPU))[case.number]
    assert isinstance(encode, LimitedEncoder)

    def prompt(words: int) -> str:
        return (case.word * words).strip()

    limit = encode.prompt_limit
    assert limit.tokens == case.tokens
    assert limit.lengths([prompt(case.words), prompt(case.words + 1)]) == [case.tokens, case.tokens + 1]

    full = case.words + case.behind
    before, last, more = joined(list(encoded(encode, [prompt(full - 1), prompt(full), prompt(full + 1)]))).tensors()[0]
    assert torch.equal(last, more)
    assert not torch.allclose(before, last)
