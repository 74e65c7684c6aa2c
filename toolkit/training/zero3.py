"""ZeRO-3: models whose parameters are born sharded; and whole state dicts of any stage."""

import shutil
from collections.abc import Callable
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import HfDeepSpeedConfig

from toolkit.errors import UserError, first_line
from toolkit.files import new_folder
from toolkit.training import ds_config
from toolkit.training.distributed import Ranks, wants_bf16

MADE = ".backbone"  # in the run folder: the backbone with its ECG rows, deleted when the run is complete


Made = tuple[PreTrainedModel, PreTrainedTokenizerBase]


def place_backbone(make: Callable[[], Made], args, ranks: Ranks, folder: str | None = None) -> Made:
    """Collective. The model and tokenizer of `make`, which loads a backbone and extends its vocabulary; under ZeRO-3 sharded from birth.

    There rank 0 alone calls `make` and saves both to the run folder, and all ranks load them from there: the rows of a sharded embedding could not be
    added to, and no other rank holds the whole model. folder: where what `make` makes lies already, if it does.
    """
    if ds_config.read(args.deepspeed)["zero_optimization"]["stage"] < 3:
        return make()
    if args.compile:
        raise UserError("--compile: ZeRO-3's hooks would be traced and compiled again and again; use ds_configs/zero2.json or leave it out")
    path = Path(folder or Path(args.output_dir) / MADE)
    if ranks.main and not folder and not (path.parent / "latest").is_file():  # of a run that saved nothing, perhaps with other arguments
        shutil.rmtree(path, ignore_errors=True)
    if ranks.main and not folder and not path.is_dir():  # it is whole or not there
        model, tokenizer = make()
        with new_folder(path) as temporary:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
        del model
    dist.barrier()
    hidden_size = AutoConfig.from_pretrained(path).hidden_size
    # the batch matters not here, and a resumed run may cut it in another way than the file says
    config = ds_config.resolve(args.deepspeed, args, ranks.world, wants_bf16(args), hidden_size, split=(1, 1))
    return _load_sharded(path, config), AutoTokenizer.from_pretrained(path)


def _load_sharded(path: Path, config: dict) -> PreTrainedModel:
    """Collective. The model in `path` with each parameter cut over the ranks as soon as it is made."""
    alive = HfDeepSpeedConfig(config)  # transformers holds it weakly: while it lives, from_pretrained makes its modules within deepspeed.zero.Init
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16 if config["bf16"]["enabled"] else torch.float32)
    except Exception as error:  # a model folder fails in as many ways as there are libraries that read it
        raise UserError(f"--backbone: {path} does not load under ZeRO-3 ({first_line(error)})") from error
    del alive
    return model


def whole_state(module: torch.nn.Module, ranks: Ranks, trained_only: bool = False) -> dict[str, torch.Tensor]:
    """Collective. Parameters and buffers of `module` on the CPU of rank 0, empty on the others; tied parameters are there once, by their first name."""
    state = {}
    for name, parameter in module.named_parameters():
        if trained_only and not parameter.requires_grad:
            continue
        sharded = [parameter] if hasattr(parameter, "ds_id") else []
        with deepspeed.zero.GatheredParameters(sharded):
            if ranks.main:
                state[name] = parameter.detach().cpu().clone()
    kept = module.state_dict().keys() if ranks.main else ()
    return state | {name: buffer.detach().cpu().clone() for name, buffer in module.named_buffers() if name in kept}
