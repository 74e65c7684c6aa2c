"""Load what the trainers wrote, for evaluation: a full model or a LoRA adapter merged into its backbone."""

import json
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from toolkit.errors import UserError
from toolkit.lm.backbone import check_stamp


def load_trained(folder: str | Path, index: dict, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model (adapter merged in) and tokenizer of a folder written by launchers/instruct.py or pretrain.py.

    index: the shards' index.json. Raises UserError naming --model if the folder is no model or knows other ECG tokens.
    """
    folder = Path(folder)
    if not any((folder / name).is_file() for name in ("adapter_config.json", "config.json")):
        raise UserError(f"--model: {folder} holds neither an adapter nor a model; name the --output_dir of launchers/instruct.py")
    check_stamp(folder, index, "--model")
    adapter = folder / "adapter_config.json"
    base = json.loads(adapter.read_text())["base_model_name_or_path"] if adapter.is_file() else folder
    try:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        if adapter.is_file():
            model = PeftModel.from_pretrained(model, folder).merge_and_unload()
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"--model: {folder} does not load with its backbone {base} ({str(error).splitlines()[0]})") from error
    return model.eval(), tokenizer
