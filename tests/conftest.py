"""Shared fixtures: a tiny language model with the ECG vocabulary, and where the real ECGs are."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def ecg_data() -> Path:
    """Folder with real ECGs ($ECG_DATA, else ../shared/data); skips where there is none."""
    folder = Path(os.environ.get("ECG_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real ECGs in {folder}; set ECG_DATA")
    return folder


@pytest.fixture(scope="session")
def tiny_with_gains():
    """(model, tokenizer, vocabulary) with gain tokens, in float32 with packed attention; do not train it."""
    from toolkit.lm import attention
    from toolkit.lm.backbone import load_backbone
    from toolkit.lm.vocabulary import extend

    model, tokenizer = load_backbone("tiny", lambda: ["sinus rhythm. normal ecg.", "Does this ECG show symptoms of atrial fibrillation?"] * 5, seed=0)
    vocabulary = extend(model, tokenizer, [6, 6, 6, 6], seed=0, knows_text=False, gain_tokens=True)
    model.set_attn_implementation(attention.NAME)
    return model.eval(), tokenizer, vocabulary


@pytest.fixture(scope="session")
def tiny(tiny_with_gains):
    """The same, its gain tokens not used."""
    from dataclasses import replace

    model, tokenizer, vocabulary = tiny_with_gains
    return model, tokenizer, replace(vocabulary, gain_first=None)
