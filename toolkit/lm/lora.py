"""LoRA through PEFT: on all linear layers but the head or on some, with rows of the vocabulary and norms trained in full beside it."""

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from toolkit.errors import UserError
from toolkit.lm.gathered import gathered

ALL_LINEAR = "all-linear"


def add_lora(
    model: PreTrainedModel,
    rank: int,
    alpha: int,
    dropout: float,
    targets: Sequence[str] = (ALL_LINEAR,),
    trained_rows: Sequence[int] = (),
    norms: bool = False,
) -> PeftModel:
    """The model with its weights frozen and LoRA of `rank` and scale alpha / rank on the linear layers of these names (q_proj, ...), or on all but the head.

    trained_rows: rows of the embedding that are trained in full beside it, and the same rows of the head, be it tied or a matrix of its own: a new
    token must be learnt as an answer too. norms: all norm layers are trained in full. Call it before `deepspeed.initialize` with the same torch seed
    on all ranks; where the parameters are born sharded (ZeRO-3) it is collective. Raises UserError naming --lora_targets.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    ends = [embedding] if head.weight is embedding.weight else [embedding, head]
    names = {module: name for name, module in model.named_modules()}
    more = {}
    if trained_rows:  # not modules_to_save: it would store all rows, and a tied head twice
        more["trainable_token_indices"] = {names[module]: list(trained_rows) for module in ends}
    if norms:
        more["modules_to_save"] = sorted({name.split(".")[-1] for module, name in names.items() if "norm" in type(module).__name__.lower()})
    config = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=_target_modules(names, head, targets), **more)
    # by itself PEFT keeps LoRA of a bf16 model in float32, which DeepSpeed's ZeRO-3 refuses; the float32 copy is the optimizer's
    # PEFT copies the rows out of weights that ZeRO-3 left empty: its own way of gathering asks for transformers' DeepSpeed configuration, which is gone
    # once the model is loaded, and for CUDA
    with gathered([module.weight for module in ends] if trained_rows else []):
        return get_peft_model(model, config, autocast_adapter_dtype=False)


def _target_modules(names: dict[torch.nn.Module, str], head: torch.nn.Module, targets: Sequence[str]) -> str | list[str]:
    if ALL_LINEAR in targets:
        return ALL_LINEAR
    linear = [name for module, name in names.items() if isinstance(module, (torch.nn.Linear, Conv1D)) and module is not head]
    unknown = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in linear)]
    if unknown or not targets:
        known = ", ".join(dict.fromkeys(name.split(".")[-1] for name in linear))
        raise UserError(f"--lora_targets: no layer is called {', '.join(map(repr, unknown)) or 'nothing'}; this backbone has {known}, or say {ALL_LINEAR}")
    return list(targets)


def save_adapter(model: PeftModel, folder: str | Path, state: dict[str, torch.Tensor]) -> None:
    """Write the adapter alone, as `PeftModel.from_pretrained` loads it.

    state: the trained weights, whole, named as `model.named_parameters()` names them. Raises RuntimeError naming those that are missing or empty (what
    ZeRO-3 leaves of a weight that was not gathered): PEFT would write such a file, and it would load as an adapter that was never trained.
    """
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    lost = [name for name in trained if name not in state or not state[name].numel()]
    if lost:
        raise RuntimeError(f"the adapter is not saved: {len(lost)} of its {len(trained)} weights are missing or empty: {', '.join(lost)}")
    # the vocabulary is the backbone's: by itself PEFT stores the whole embedding where it was resized
    model.save_pretrained(folder, state_dict=state, save_embedding_layers=False)
    (Path(folder) / "README.md").unlink()  # peft's model card, a template of [More Information Needed]


def unmoved(model: PeftModel) -> list[str]:
    """Names of the LoRA B factors that are zero, as they are before the first step; [] after it, if all of them are trained.

    Under ZeRO-3 of this rank's part of each weight alone: call it on all ranks, and only what all of them name has not moved.
    """
    return [name for name, weight in model.named_parameters() if ".lora_B." in name and not getattr(weight, "ds_tensor", weight).any()]
