"""Arguments of every trainer, named as `transformers.TrainingArguments` names them; the text under a field is the text of --help."""

import argparse
import difflib
import math
import sys
from dataclasses import asdict, dataclass, field
from typing import ClassVar, Literal

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from toolkit import recipe as recipes
from toolkit.errors import UserError
from toolkit.lm.checkpointing import layers_apart
from toolkit.training.profile import steps_of


def arg(help: str, default=..., **more):
    """A dataclass field with its --help text; without a default the argument is required. A list as default is copied for each instance."""
    given = {} if default is ... else {"default_factory": default.copy} if isinstance(default, list) else {"default": default}
    return field(metadata={"help": help.replace("%", "%%"), **more}, **given)


AT_LEAST_ONE = {
    "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "logging_steps", "save_steps", "save_total_limit",
    "max_eval_samples", "max_skipped", "seq_len", "lora_r", "lora_alpha", "max_new_tokens",
}  # fmt: skip
NOT_NEGATIVE = {"seed", "eval_steps", "keep_every", "early_stopping_patience", "warmup_steps", "weight_decay", "max_grad_norm", "learning_rate", "lora_dropout",
                "tasks_per_ecg", "max_eval_answers", "hang_timeout"}  # fmt: skip


@dataclass(kw_only=True)
class LaunchArguments:
    """What every launcher takes."""

    stage: ClassVar[str | None] = None  # the section of a recipe that is the launcher's

    output_dir: str = arg("Folder of the run: results, log.jsonl, tensorboard/, checkpoints. The same command on an existing folder resumes.")
    seed: int = arg("Seed of initialisation, order of the data and dropout.", 42)
    local_rank: int = arg("Set by the deepspeed launcher.", -1)

    def __post_init__(self):
        for name in AT_LEAST_ONE | NOT_NEGATIVE:
            value, least = getattr(self, name, None), int(name in AT_LEAST_ONE)
            if value is not None and not least <= value < math.inf:  # nor NaN
                raise UserError(f"--{name} must be {'finite' if value == math.inf else f'at least {least}'}, not {value}")


@dataclass(kw_only=True)
class TrainingArguments(LaunchArguments):
    """What every trainer takes. One optimizer step sees per_device_train_batch_size x gradient_accumulation_steps x ranks ECGs (pretraining: rows)."""

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
    save_total_limit: int = arg("Newest checkpoints kept; older ones are deleted.", 2)
    keep_every: int = arg("Checkpoints whose step is a multiple of this are kept as well. 0: none.", 0)
    max_skipped: int = arg("Stop after this many steps in a row whose loss or gradients are not finite; such a step changes no weight.", 5)
    profile: str | None = arg("Trace steps with torch.profiler, counted from 0: 10:15 are the steps 10 to 14. To profile/ in --output_dir.", None)
    hang_timeout: float = arg(
        "Seconds without progress of any rank after which the run ends with exit code 86, every rank's stacks in hang/ and the rank that holds the others up"
        " named. What a rank writes while it saves is progress; counted from the first step on. 0: never, for a debugger.", 1800
    )  # fmt: skip
    precision: Literal["auto", "bf16", "fp32"] = arg("auto: bf16 where the processor is fast at it, else fp32.", "auto")

    def __post_init__(self):
        super().__post_init__()
        if self.max_steps < 0 and not 0 < self.num_train_epochs < math.inf:
            raise UserError("--num_train_epochs must be a number above 0 (or give --max_steps)")
        if self.profile is not None:
            steps_of(self.profile)
        if self.early_stopping_patience and not self.eval_steps:
            raise UserError("--early_stopping_patience needs --eval_steps: without it there is no validation before the end")


@dataclass(kw_only=True)
class LanguageModelArguments(TrainingArguments):
    """What the trainers of language models take."""

    gradient_checkpointing: str = arg("Recompute activations in the backward pass: none, full (a third more time) or every_N (each N-th layer).", "none")
    kernels: Literal["auto", "liger", "eager"] = arg("Fused kernels. auto: Liger's on GPUs where liger-kernel is installed, else eager.", "auto")
    compile: bool = arg("torch.compile the decoder layers: a minute or two at the start. Not with ZeRO-3.", False)

    def __post_init__(self):
        super().__post_init__()
        layers_apart(self.gradient_checkpointing)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults after every help text, the module's docstring as it is written."""


def parse(cls, description: str, argv: list[str] | None = None):
    """An instance of the dataclass from the command line, and from the YAML file that --recipe names, which the command line overrides.

    Exits with 2 and a usage line on an unknown or missing argument; raises UserError naming the file and the key for a mistake in a recipe.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = HfArgumentParser(cls, description=description, formatter_class=_HelpFormatter, allow_abbrev=False)
    parser.add_argument(
        "--recipe", metavar="FILE", help="YAML file of arguments, `name: value` each, or of sections of them (recipes/). The command line overrides it."
    )
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe", nargs="?")  # without a value it is the other parser that complains
    recipe = first.parse_known_args(argv)[0].recipe
    if recipe is not None:
        _use_recipe(parser, recipe, cls.stage)
    args, _, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return args


def _use_recipe(parser: HfArgumentParser, path: str, stage: str | None) -> None:
    """Make the values of a recipe, or of its section `stage`, the parser's defaults; an argument that it gives is no longer required."""
    recipe, where = recipes.read(path, stage), recipes.where(path, stage)
    actions = {action.dest: action for action in reversed(parser._actions) if action.dest not in ("help", "recipe")}  # --no_x comes after --x
    values = {}
    for name, value in recipe.items():
        if name not in actions:
            close = difflib.get_close_matches(str(name), actions, 1)
            raise UserError(f"{where}: there is no argument {name!r}" + (f"; did you mean {close[0]!r}?" if close else "; --help lists them"))
        action = actions[name]
        if isinstance(value, list) != (action.nargs == "+"):
            raise UserError(f"{where}: {name}: must be {'a list' if action.nargs == '+' else 'one value'}, not {value!r}")
        # YAML reads an unquoted yes or no as a boolean, and 1e-4 as text: so every value goes through the argument's own reading of text
        read = [_read(action, part, f"{where}: {name}") for part in (value if action.nargs == "+" else [value])]
        values[name] = read if action.nargs == "+" else read[0]
        action.required = False
    parser.set_defaults(**values)


def _read(action: argparse.Action, value, where: str):
    """One value of a recipe as the command line would read it; raises UserError opening with `where`."""
    try:
        if value is None or isinstance(value, (dict, list)) or isinstance(value, bool) != (action.type is string_to_bool):
            raise ValueError
        read = action.type(str(value))
        if action.choices is not None and read not in action.choices:
            raise ValueError
    except (ValueError, argparse.ArgumentTypeError):
        wanted = f"one of {', '.join(action.choices)}" if action.choices else "true or false" if action.type is string_to_bool else action.type.__name__
        hint = "; put it in quotes" if isinstance(value, bool) else "; leave it out for the default" if value is None else ""
        raise UserError(f"{where}: must be {wanted}, not {value!r}{hint}") from None
    return read


def as_record(args) -> dict:
    """The arguments as they go into the run folder."""
    return {name: value for name, value in asdict(args).items() if name != "local_rank"}
