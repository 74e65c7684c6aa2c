"""Arguments of every trainer, named as `transformers.TrainingArguments` names them; the text under a field is the text of --help."""

import argparse
import sys
from dataclasses import asdict, dataclass, field
from typing import Literal

from transformers import HfArgumentParser

from toolkit.errors import UserError


def arg(help: str, default=..., **more):
    """A dataclass field with its --help text; without a default the argument is required. A list as default is copied for each instance."""
    given = {} if default is ... else {"default_factory": default.copy} if isinstance(default, list) else {"default": default}
    return field(metadata={"help": help.replace("%", "%%"), **more}, **given)


AT_LEAST_ONE = {
    "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "logging_steps", "save_steps", "save_total_limit",
    "max_eval_samples", "tasks_per_ecg", "lora_r", "lora_alpha", "max_new_tokens",
}  # fmt: skip
NOT_NEGATIVE = {"seed", "eval_steps", "early_stopping_patience", "warmup_steps", "weight_decay", "max_grad_norm", "learning_rate", "lora_dropout"}


@dataclass(kw_only=True)
class LaunchArguments:
    """What every launcher takes."""

    output_dir: str = arg("Folder of the run: results, log.jsonl, tensorboard/, checkpoints. The same command on an existing folder resumes.")
    seed: int = arg("Seed of initialisation, order of the data and dropout.", 42)
    local_rank: int = arg("Set by the deepspeed launcher.", -1)

    def __post_init__(self):
        for name in AT_LEAST_ONE | NOT_NEGATIVE:
            value, least = getattr(self, name, None), int(name in AT_LEAST_ONE)
            if value is not None and value < least:
                raise UserError(f"--{name} must be at least {least}, not {value}")


@dataclass(kw_only=True)
class TrainingArguments(LaunchArguments):
    """What every trainer takes. One optimizer step sees per_device_train_batch_size x gradient_accumulation_steps x ranks ECGs."""

    deepspeed: str = arg("DeepSpeed configuration, for example ds_configs/zero2.json; every \"auto\" in it is filled from these arguments.")
    per_device_train_batch_size: int = arg("ECGs (with all their tasks) per rank and micro-batch.", 8)
    gradient_accumulation_steps: int = arg("Micro-batches per optimizer step.", 1)
    learning_rate: float | None = arg("Peak learning rate of AdamW. Default: falls with the width of the backbone.", None)
    weight_decay: float = arg("Weight decay of matrices; vectors (norms, biases) have none.", 0.0)
    max_grad_norm: float = arg("Gradients are clipped to this global norm.", 1.0)
    num_train_epochs: float = arg("Passes over the training ECGs.", 3.0)
    max_steps: int = arg("Optimizer steps; overrides --num_train_epochs when not negative.", -1)
    warmup_steps: int = arg("Steps of linear warm-up, before the cosine to zero.", 20)
    logging_steps: int = arg("Steps between two lines of log.jsonl and TensorBoard.", 10)
    eval_steps: int = arg("Steps between two validations; 0: at the end alone.", 0)
    early_stopping_patience: int = arg(
        "Validations without a better result after which training stops; the best model is then the run's result. 0: train to the last step.", 0
    )
    max_eval_samples: int = arg("Validate on at most this many ECGs, evenly spaced over the valid split.", 512)
    save_steps: int = arg("Steps between two checkpoints.", 500)
    save_total_limit: int = arg("Checkpoints kept; older ones are deleted.", 2)
    precision: Literal["auto", "bf16", "fp32"] = arg("auto: bf16 where the processor is fast at it, else fp32.", "auto")
    gradient_checkpointing: bool = arg("Recompute activations in the backward pass: less memory, about a third more time.", False)

    def __post_init__(self):
        super().__post_init__()
        if self.max_steps < 0 and self.num_train_epochs <= 0:
            raise UserError("--num_train_epochs must be above 0 (or give --max_steps)")
        if self.early_stopping_patience and not self.eval_steps:
            raise UserError("--early_stopping_patience needs --eval_steps: without it there is no validation before the end")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults after every help text, the module's docstring as it is written."""


def parse(cls, description: str, argv: list[str] | None = None):
    """An instance of the dataclass from the command line. Exits with 2 and a usage line on an unknown or missing argument."""
    parser = HfArgumentParser(cls, description=description, formatter_class=_HelpFormatter, allow_abbrev=False)
    args, unknown = parser.parse_args_into_dataclasses(sys.argv[1:] if argv is None else argv, return_remaining_strings=True)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return args


def as_record(args) -> dict:
    """The arguments as they go into the run folder."""
    return {name: value for name, value in asdict(args).items() if name != "local_rank"}
