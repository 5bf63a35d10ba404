"""Text encoders and tokenizers as they are published, and what they lack, found before the first one encodes."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from tiny_folders import PROMPTS, TOKENS, save_stable_diffusion_3
from transformers import T5EncoderModel, T5TokenizerFast

from leapalign.config import ModelConfig
from leapalign.inputs.validation import UserError
from leapalign.models import encode_prompts

VOCABULARY = 40


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Whose T5 has its tokenizer as SentencePiece's file alone, as copies without tokenizer.json have it."""
    save_stable_diffusion_3(tmp_path / "model")
    tokenizer, encoder = (tmp_path / "model" / name for name in ("tokenizer_3", "text_encoder_3"))
    t5 = T5EncoderModel.from_pretrained(encoder)
    t5.resize_token_embeddings(VOCABULARY)
    t5.save_pretrained(encoder)
    for file in tokenizer.iterdir():
        file.unlink()
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(PROMPTS * 20),
        model_writer=model,
        vocab_size=VOCABULARY,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (tokenizer / "spiece.model").write_bytes(model.getvalue())
    settings = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "model_max_length": TOKENS}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(settings))
    return tmp_path / "model"


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Is told of each text encoder whose weights are read."""
    module: Any = sys.modules["leapalign.models.text_encoders"]
    read, told = module.read_network, []
    monkeypatch.setattr(module, "read_network", lambda *given: told.append(given[-1]) or read(*given))
    return told


def test_sentencepiece_alone_makes_a_tokenizer(folder: Path) -> None:
    tokens = T5TokenizerFast.from_pretrained(folder / "tokenizer_3")(PROMPTS, padding="max_length", truncation=True)
    found = encode_prompts(ModelConfig(path=str(folder)), PROMPTS).parts["t5"]
    encoder = T5EncoderModel.from_pretrained(folder / "text_encoder_3").eval()
    with torch.no_grad():
        torch.testing.assert_close(found, encoder(torch.tensor(tokens.input_ids)).last_hidden_state)
    assert not torch.allclose(found[0], found[1])


def test_a_missing_library_is_told_before_the_first_encodes(
    folder: Path, loads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(UserError, match=r"cannot load the tokenizer_3 of .*; check model\.path"):
        encode_prompts(ModelConfig(path=str(folder)), PROMPTS)
    assert loads == []


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        (
            "tokenizer_3/spiece.model",
            r"cannot load the tokenizer_3 of .*no vocabulary in its files\); check model\.path",
        ),
        ("text_encoder_3/model.safetensors", r"text_encoder_3' holds no safetensors; finish the download"),
        ("text_encoder_3", r"has no text_encoder_3, .*; set model\.path to the complete folder, or prompts\.cache to"),
        ("tokenizer_3", r"has no tokenizer_3, which prompts are encoded with"),
    ],
)
def test_what_the_last_one_lacks_is_told_before_the_first_encodes(
    folder: Path, lost: str, message: str, loads: list[str]
) -> None:
    path = folder / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(UserError, match=message):
        encode_prompts(ModelConfig(path=str(folder)), PROMPTS)
    assert loads == []
