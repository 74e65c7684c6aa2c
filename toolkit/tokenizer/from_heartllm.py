"""Make a tokenizer folder of the `best.pt` of the authors' release, for sharding.shard and everything after it.

    python -m toolkit.tokenizer.from_heartllm best.pt --out runs/heartllm/tokenizer
"""

import argparse
from pathlib import Path

from toolkit.errors import UserError, exit_2_on_user_error
from toolkit.files import new_folder
from toolkit.tokenizer.tokenizer import ECGTokenizer


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m toolkit.tokenizer.from_heartllm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", metavar="BEST.pt", help="the file; nothing but tensors is loaded from it")
    parser.add_argument("--out", required=True, type=Path, help="new folder, for config.json and model.safetensors")
    args = parser.parse_args(argv)
    tokenizer = ECGTokenizer.from_heartllm(args.path)
    if args.out.exists():
        raise UserError(f"--out: {args.out} is there already; name a new folder")
    with new_folder(args.out) as folder:
        tokenizer.save_pretrained(folder)
    print(f"{args.out}: tokenizer {tokenizer.fingerprint()}")


if __name__ == "__main__":
    exit_2_on_user_error(main)()
