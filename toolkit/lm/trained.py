"""Load what the trainers wrote, for evaluation: a full model or a LoRA adapter merged into its backbone."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from toolkit.errors import UserError, first_line
from toolkit.lm.backbone import check_stamp
from toolkit.lm.vocabulary import ecg_vocabulary
from toolkit.tasks.vocabulary import ECGVocabulary


def load_trained(folder: str | Path, index: dict, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, ECGVocabulary]:
    """Model (adapter merged in), tokenizer and ECG vocabulary of a folder written by launchers/instruct.py or pretrain.py.

    index: the shards' index.json. Raises UserError naming --model if the folder is no model or knows other ECG tokens.
    """
    folder = Path(folder)
    if not any((folder / name).is_file() for name in ("adapter_config.json", "config.json")):
        raise UserError(f"--model: {folder} holds neither an adapter nor a model; name the --output_dir of launchers/instruct.py")
    stamp = check_stamp(folder, index, "--model")
    adapter = folder / "adapter_config.json"
    try:
        base = _backbone_of(folder) if adapter.is_file() else folder
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        if adapter.is_file():
            model = PeftModel.from_pretrained(model, folder).merge_and_unload()
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # a model folder fails in as many ways as there are libraries that read it
        raise UserError(f"--model: {folder} does not load, or its backbone does not ({first_line(error)})") from error
    return model.eval(), tokenizer, replace(ecg_vocabulary(tokenizer), gain_text=stamp["gain_text"])


def _backbone_of(folder: Path) -> str:
    """The backbone that an adapter names; if it is no longer there, the folder of that name beside the adapter (a moved run)."""
    named = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    beside = folder.resolve().parent / Path(named).name
    return str(beside) if Path(named).is_absolute() and not Path(named).exists() and beside.is_dir() else named
