"""Load what the trainers wrote, for evaluation: a full model or a LoRA adapter merged into its backbone."""

import json
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from toolkit.errors import UserError, first_line
from toolkit.lm.backbone import backbone_digest, check_stamp
from toolkit.lm.continuous import ECGAdapter
from toolkit.lm.vocabulary import ecg_vocabulary
from toolkit.tasks.prompts import Prompts
from toolkit.tasks.vocabulary import ECGVocabulary

ADAPTER = "adapter_config.json"


def load_trained(
    folder: str | Path, index: dict, dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, ECGVocabulary, Prompts, ECGAdapter | None]:
    """Model (LoRA merged in), tokenizer, ECG vocabulary, prompts and, if it reads continuous ECGs, the layer that they go through; of a folder written by
    launchers/instruct.py, pretrain.py or toolkit.lm.merge.

    index: the shards' index.json. Raises UserError naming --model if the folder is no model or knows other ECG tokens.
    """
    folder = Path(folder)
    if not any((folder / name).is_file() for name in (ADAPTER, "config.json")):
        raise UserError(f"--model: {folder} holds neither an adapter nor a model; name the --output_dir of launchers/instruct.py")
    stamp = check_stamp(folder, index, "--model")
    model, tokenizer = load_merged(folder, dtype, "--model")
    asked = stamp.get("prompts", {"gain_text": stamp.get("gain_text", False)})  # older stamps say of their prompts this alone
    vocabulary = ecg_vocabulary(tokenizer)
    adapter = ECGAdapter.load(folder, vocabulary.code_rows, "--model").to(dtype) if stamp.get("ecg_input") == "continuous" else None
    return model.eval(), tokenizer, vocabulary, Prompts(**asked), adapter


def load_merged(folder: Path, dtype: torch.dtype, flag: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A plain model and its tokenizer: of a model's folder, or of an adapter's with the adapter merged into its backbone.

    An adapter that was trained on a 4-bit backbone is merged into the unquantised weights. Raises UserError naming the flag if one does not load.
    """
    base = backbone_of(folder, flag) if (folder / ADAPTER).is_file() else folder
    try:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        if base != folder:
            model = PeftModel.from_pretrained(model, folder).merge_and_unload()
        return model, AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # a model folder fails in as many ways as there are libraries that read it
        raise UserError(f"{flag}: {folder} does not load, or its backbone {base} does not ({first_line(error)})") from error


def backbone_of(folder: Path, flag: str) -> Path | str:
    """The backbone that an adapter names: a folder, or a name of the hub. If the folder is gone, the one of that name in or beside the adapter's.

    Raises UserError naming the flag if there is none.
    """
    try:
        named = json.loads((folder / ADAPTER).read_text())["base_model_name_or_path"]
        path = Path(named)
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{flag}: {folder / ADAPTER} is damaged or names no backbone; make the adapter again") from None
    if not path.is_absolute():
        return named
    here = folder.resolve()
    # of a moved run: made by that run, beside it, or of a `last/` in it
    places = [path, *(parent / path.name for parent in (here, here.parent, here.parent.parent))]
    found = next((place for place in places if place.is_dir()), None)
    if not found:
        raise UserError(f"{flag}: the backbone of {folder} is gone; put it back to {path}, or beside the adapter as {places[2]}")
    return found


def model_digest(folder: str, model) -> str:
    """What tells this model from another of the same name; of an adapter, its backbone with it."""
    of_backbone = backbone_digest(str(backbone_of(Path(folder), "--model")), model) if (Path(folder) / ADAPTER).is_file() else ""
    return f"{backbone_digest(folder, model)} {of_backbone}".strip()
