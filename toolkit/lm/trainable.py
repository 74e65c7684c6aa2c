"""`--train`: which weights of a backbone pretraining changes, and the plain Hugging Face weights of what it made of them."""

from collections.abc import Callable

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel

from toolkit.ecg.gains import GAIN_BINS
from toolkit.lm.lora import add_lora
from toolkit.tasks.vocabulary import ECGVocabulary

RELEASE = dict(rank=64, alpha=16, dropout=0.05)  # model/heartllm.py of the authors' release; on q k v o gate up down


def choose_trainable(model: PreTrainedModel, vocabulary: ECGVocabulary, how: str) -> PreTrainedModel | PeftModel:
    """The model with requires_grad set; call it before `deepspeed.initialize`, with the same torch seed on all ranks.

    full: all. new_rows: the ECG rows of embedding and head alone; the optimizer must have no weight decay, which moves rows without a gradient.
    lora+norms+embeddings: LoRA on every linear layer but the head, and norms, embedding and head in full beside it.
    """
    if how == "full":
        return model
    if how == "new_rows":
        model.requires_grad_(False)
        for weight in _ends(model):
            weight.requires_grad_(True)
            weight.register_hook(_only(ecg_rows(vocabulary)))
        return model
    model = add_lora(model, **RELEASE)
    for module in model.modules():
        if "norm" in type(module).__name__.lower():  # LlamaRMSNorm, LayerNorm, ...
            module.requires_grad_(True)
    for weight in _ends(model.get_base_model()):  # not modules_to_save of peft: it would store a tied head twice
        weight.requires_grad_(True)
    return model


def ecg_rows(vocabulary: ECGVocabulary) -> list[int]:
    """Ids of the start and end token, the codes, and the gain tokens where there are any."""
    gains = [] if vocabulary.gain_first is None else range(vocabulary.gain_first, vocabulary.gain_first + GAIN_BINS)
    return [vocabulary.start, vocabulary.end, *range(vocabulary.first, vocabulary.first + vocabulary.codes), *gains]


def merged_state(state: dict[str, torch.Tensor], model: PreTrainedModel | PeftModel) -> dict[str, torch.Tensor]:
    """From whole weights named as `model.state_dict()` names them to those of the plain Hugging Face model, LoRA merged in float32.

    A tied head is left out, as in Hugging Face's own files. `model` only tells what is LoRA and at which scale: its weights may be partitioned.
    """
    state = dict(state)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    head, tied = base.get_output_embeddings(), len(_ends(base)) == 1
    for name, module in model.named_modules():
        if tied and module is head:
            state.pop(f"{name}.weight", None)
        if isinstance(module, LoraLayer):
            (adapter,) = module.active_adapters
            down, up = (state.pop(f"{name}.{part}.{adapter}.weight").float() for part in ("lora_A", "lora_B"))
            change = module.scaling[adapter] * (up @ down)
            weight = state[f"{name}.base_layer.weight"]
            # GPT-2's Conv1D keeps its weight transposed
            state[f"{name}.base_layer.weight"] = (weight.float() + (change.T if module.fan_in_fan_out else change)).to(weight.dtype)
    return {name.removeprefix("base_model.model.").replace(".base_layer.", "."): weight for name, weight in state.items()}


def _ends(base: PreTrainedModel) -> list[torch.nn.Parameter]:
    """The weights of embedding and head, one where they are tied."""
    embedding, head = base.get_input_embeddings().weight, base.get_output_embeddings().weight
    return [embedding] if head is embedding else [embedding, head]


def _only(rows: list[int]) -> Callable[[torch.Tensor], torch.Tensor]:
    """A hook that keeps the gradient of `rows` and zeroes the others, NaN included. With a zero gradient from the first step on AdamW leaves a row as it is."""

    def keep(gradient: torch.Tensor) -> torch.Tensor:
        index = torch.tensor(rows, device=gradient.device)
        return torch.zeros_like(gradient).index_copy_(0, index, gradient[index])

    return keep
