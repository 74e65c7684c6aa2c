"""Backbones without their weights, on the meta device: what `python -m toolkit.plan` counts parameters, FLOPs and activations of."""

import math
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PretrainedConfig, PreTrainedModel, Qwen2Config

from toolkit.ecg.gains import GAIN_BINS
from toolkit.errors import UserError, first_line
from toolkit.lm.backbone import TINY, TINY_TEXT_VOCABULARY
from toolkit.lm.vocabulary import PAD_TO, ecg_vocabulary
from toolkit.tasks.vocabulary import ECGVocabulary

SHAPE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size", "tie_word_embeddings")
# As the models' config.json say; last the number of tokens of their tokenizers, which for Qwen2.5 is less than the rows of the embedding.
PUBLISHED = {
    "Llama-3.2-1B": (LlamaConfig, (2048, 8192, 16, 32, 8, 128256, True), 128256),
    "Llama-3.2-3B": (LlamaConfig, (3072, 8192, 28, 24, 8, 128256, True), 128256),
    "Llama-3.1-8B": (LlamaConfig, (4096, 14336, 32, 32, 8, 128256, False), 128256),
    "Qwen2.5-0.5B": (Qwen2Config, (896, 4864, 24, 14, 2, 151936, True), 151665),
    "Qwen2.5-1.5B": (Qwen2Config, (1536, 8960, 28, 12, 2, 151936, True), 151665),
    "Qwen2.5-3B": (Qwen2Config, (2048, 11008, 36, 16, 2, 151936, True), 151665),
    "Qwen2.5-7B": (Qwen2Config, (3584, 18944, 28, 28, 4, 152064, False), 151665),
    "SmolLM2-135M": (LlamaConfig, (576, 1536, 30, 9, 3, 49152, True), 49152),
    "SmolLM2-360M": (LlamaConfig, (960, 2560, 32, 15, 5, 49152, True), 49152),
    "SmolLM2-1.7B": (LlamaConfig, (2048, 8192, 24, 32, 32, 49152, True), 49152),
    "tiny": (LlamaConfig, (*TINY.values(), TINY_TEXT_VOCABULARY, True), TINY_TEXT_VOCABULARY),
}


def shape_of(name: str, codes: int, gain_tokens: bool) -> tuple[PreTrainedModel, SimpleNamespace, ECGVocabulary]:
    """The backbone of `--backbone` on the meta device with rows for the ECG tokens, what `ecg_ids` asks of its tokenizer, and its ECG vocabulary.

    From the folder, else from the table of published shapes (the hub is asked for others alone). Raises UserError naming --backbone.
    """
    known = "SmolLM2-135M" if name == "smollm2" else name.rsplit("/", 1)[-1].removesuffix("-Instruct")
    vocabulary = None
    if known in PUBLISHED and not Path(name).is_dir():
        kind, shape, tokens = PUBLISHED[known]
        config = kind(**dict(zip(SHAPE, shape)))
        tokenizer = SimpleNamespace(bos_token_id=None if kind is Qwen2Config else 0)
    else:
        try:
            config, real = AutoConfig.from_pretrained(name), AutoTokenizer.from_pretrained(name)
        except Exception as error:  # a model folder fails in as many ways as there are libraries that read it
            raise UserError(
                f"--backbone: {name!r} is no folder with a model, no model of the hub that can be reached, and none of {', '.join(PUBLISHED)}"
                f" ({first_line(error)})"
            ) from error
        tokens, vocabulary, tokenizer = len(real), ecg_vocabulary(real), SimpleNamespace(bos_token_id=real.bos_token_id)
    if vocabulary is None or (gain_tokens and vocabulary.gain_first is None):  # the rows that toolkit/lm/vocabulary.py adds
        start, tokens = (vocabulary.start, tokens) if vocabulary else (tokens, tokens + 2 + codes)
        vocabulary = ECGVocabulary(start, start + 1, start + 2, codes, tokens if gain_tokens else None)
        config.vocab_size = math.ceil(max(tokens + GAIN_BINS * gain_tokens, config.vocab_size) / PAD_TO) * PAD_TO
    return _without_weights(config), tokenizer, vocabulary


def _without_weights(config: PretrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
