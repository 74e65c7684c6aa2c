"""Merge a LoRA adapter into its backbone: a plain Hugging Face folder, for software that knows no PEFT.

    python -m toolkit.lm.merge --adapter runs/demo/instruct --out runs/demo/merged

`AutoModelForCausalLM.from_pretrained("runs/demo/merged")`, and `launchers/evaluate.py --model runs/demo/merged`. Merged in float32, then rounded to
--precision. An adapter that was trained on a 4-bit backbone is merged into the unquantised weights.
"""

import argparse
import json
import shutil
import warnings
from pathlib import Path

import torch
import transformers

from toolkit.errors import UserError, exit_2_on_user_error
from toolkit.files import new_folder, share, write_text
from toolkit.lm.backbone import STAMP
from toolkit.lm.carried import FOLDER, carried_in
from toolkit.lm.continuous import FILE
from toolkit.lm.trained import ADAPTER, backbone_of, load_merged

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m toolkit.lm.merge", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", required=True, type=Path, help="folder written by launchers/instruct.py")
    parser.add_argument("--out", required=True, type=Path, help="new folder, for the model, its tokenizers and its stamp")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of the weights that are written (default: fp32)")
    args = parser.parse_args(argv)
    if args.out.exists():
        raise UserError(f"--out: {args.out} is there already; name a new folder")
    for name in (ADAPTER, STAMP):
        if not (args.adapter / name).is_file():
            raise UserError(f"--adapter: {args.adapter} has no {name}, so it is no adapter; name the --output_dir of launchers/instruct.py")
    if (args.adapter / FILE).is_file():
        raise UserError(f"--adapter: {args.adapter} was tuned with --ecg_input continuous, which a plain Hugging Face model cannot hold; use it as it is")
    print(f"merging {args.adapter} into {backbone_of(args.adapter, '--adapter')}", flush=True)
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # transformers 5.23 of peft 0.21
    model, tokenizer = load_merged(args.adapter, torch.float32, "--adapter")
    model.to(PRECISIONS[args.precision])
    with new_folder(args.out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        # the same ECG tokens and prompts; no path of where the training shards lay goes along: their digests tell them
        stamp = json.loads((args.adapter / STAMP).read_text())
        trained = [one | {"shards": one["shards"] and Path(one["shards"]).name} for one in stamp.get("trained_on", [])]
        write_text(folder / STAMP, json.dumps(stamp | ({"trained_on": trained} if trained else {}), indent=2))
        if carried := carried_in(args.adapter):
            shutil.copytree(carried, folder / FOLDER)
        share(folder)
    print(f"{args.out}: {model.num_parameters():,} parameters in {args.precision}. Research software; not for diagnosis.")


if __name__ == "__main__":
    exit_2_on_user_error(main)()
