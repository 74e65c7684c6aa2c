"""`--quantize nf4`: a backbone with its linear layers in 4 bits, frozen, for LoRA beside them (QLoRA, arXiv 2305.14314)."""

import importlib.util

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from toolkit.errors import UserError, first_line


def check_nf4(device: torch.device, stage: int) -> None:
    """Raises UserError naming --quantize if this machine cannot, or if the ZeRO stage would cut up the weights, which are packed two to a byte."""
    if device.type != "cuda":
        raise UserError("--quantize nf4: needs a CUDA GPU; leave it out")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("--quantize nf4: bitsandbytes is not installed (pip install bitsandbytes)")
    if stage > 2:
        raise UserError("--quantize nf4: does not go with ZeRO-3; use ds_configs/zero2.json")


def load_nf4(folder: str, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model of a folder or of the hub on `device`, and its tokenizer: linear layers in NF4 with quantised scales, all else in bf16.

    The head is among what stays: the loss takes its weight (toolkit/lm/kernels.py). Raises UserError naming --backbone if it does not load.
    """
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16)
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=nf4, dtype=torch.bfloat16, device_map={"": device})
        return model, AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # a model folder fails in as many ways as there are libraries that read it
        raise UserError(f"--backbone: {folder} does not load in 4 bits ({first_line(error)})") from error
