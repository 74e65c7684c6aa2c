"""LoRA through PEFT on every linear layer but the head."""

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel


def add_lora(model: PreTrainedModel, rank: int, alpha: int, dropout: float, trained_rows: range = range(0)) -> PeftModel:
    """The model with its weights frozen and LoRA of `rank` and scale alpha / rank on all linear layers.

    trained_rows: rows of the embedding (and of a tied head) that are trained in full beside it.
    """
    rows = {"trainable_token_indices": list(trained_rows)} if len(trained_rows) else {}
    config = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules="all-linear", **rows)
    # by itself PEFT keeps LoRA of a bf16 model in float32, which DeepSpeed's ZeRO-3 refuses; the float32 copy is the optimizer's
    return get_peft_model(model, config, autocast_adapter_dtype=False)


def save_adapter(model: PeftModel, folder, state: dict[str, torch.Tensor]) -> None:
    """The adapter alone: the vocabulary is the backbone's, so peft must not store the whole embedding with it. state: the trained weights, whole."""
    model.save_pretrained(folder, state_dict=state, save_embedding_layers=False)
    (Path(folder) / "README.md").unlink()  # peft's model card, a template of [More Information Needed]
