"""Write .deepspeed_env: the variables of this shell that `deepspeed --hostfile` is to set on every node, and does not by itself.

    python launchers/deepspeed_env.py                                  # in the folder, and with the environment, in which deepspeed is then started
    deepspeed --hostfile hosts launchers/pretrain.py --recipe recipes/llama3.2-3b-pretrain.yaml

By itself DeepSpeed 0.19 hands on, over ssh, what begins with PYTHON, UCX, MV2 or MLFLOW; NCCL_* only where the machine it is started on has a GPU. It reads
.deepspeed_env of the home folder, then that of the folder it is started in, which is the one this writes. SLURM's srun and `deepspeed --no_ssh` need none of
it: there each node's launcher has an environment of its own. Secrets stay out; write it again when the environment has changed: your own lines stay.
"""

import argparse
import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from toolkit.errors import UserError, exit_2_on_user_error
from toolkit.files import whole_file

NAME = ".deepspeed_env"
# not CUDA_VISIBLE_DEVICES: the launcher sets it on each node by the slots of the hostfile
PREFIXES = {
    "OMP_": "threads of a rank", "MKL_": "threads of a rank", "KMP_": "threads of a rank", "DS_": "DeepSpeed, such as DS_ACCELERATOR=cpu",
    "CUDA_": "where CUDA is, for ops that are compiled", "NCCL_": "handed on by DeepSpeed itself only from a machine with a GPU",
    "GLOO_": "network interface of ranks on CPUs", "TORCH": "caches, compiled ops, NCCL's time limit", "TRITON_": "caches of compiled kernels",
    "HF_": "where models are, whether the hub may be asked", "TRANSFORMERS_": "where models are, whether the hub may be asked",
}  # fmt: skip
NAMES = {
    "PATH": "compilers and ninja: a shell over ssh has but the system's", "LD_LIBRARY_PATH": "CUDA's libraries", "VIRTUAL_ENV": "which environment this is",
    "TOKENIZERS_PARALLELISM": "of the Hugging Face tokenizer", "XDG_CACHE_HOME": "where models are", "NLTK_DATA": "WordNet, for METEOR",
    "SSL_CERT_FILE": "certificates of the site", "REQUESTS_CA_BUNDLE": "certificates of the site",
    "http_proxy": "the way to the hub", "https_proxy": "the way to the hub", "no_proxy": "the way to the hub",
    "HTTP_PROXY": "the way to the hub", "HTTPS_PROXY": "the way to the hub", "NO_PROXY": "the way to the hub",
}  # fmt: skip
NOT = ("CUDA_VISIBLE_DEVICES", "DS_ENV_FILE")
SECRET = re.compile("TOKEN(?!IZERS_PARALLELISM)|KEY|SECRET|PASS|PWD|PW$|CREDENTIAL|AUTH|BEARER", re.IGNORECASE)
IN_VALUE = re.compile(r"(^|//)[^/@]*:[^@]*@|[?&][^=&]*(token|key|sig|credential|secret|pass|auth)[^=&]*=", re.IGNORECASE)  # user:password@host, a signed URL


def chosen(environment: dict[str, str]) -> tuple[list[str], dict[str, str]]:
    """Lines of the file, and why of those variables that are left out."""
    lines, left = [], {}
    for name, value in sorted(environment.items()):
        if not ours(name):
            continue
        if SECRET.search(name) or IN_VALUE.search(value):
            left[name] = "a secret, and every user of a node sees the commands that run there; `hf auth login` keeps a token in HF_HOME, which nodes can share"
        elif not value or value != value.strip() or "\n" in value:
            left[name] = "DeepSpeed loses empty values, spaces at the ends and line breaks"
        else:
            lines.append(f"{name}={quoted(value)}")
    return lines, left


def ours(name: str) -> bool:
    """Whether this program decides about a variable; all others in the file were put there by hand."""
    return name in NAMES or (name.startswith(tuple(PREFIXES)) and name not in NOT)


def quoted(value: str) -> str:
    r"""As it must stand in the file. DeepSpeed puts what is no plain word between double quotes, as it is, and pdsh reads %h, %n and %u in it.

    >>> print(quoted('say "$HOME"'))
    say \"\$HOME\"
    """
    return re.sub(r'([\\"$`])', r"\\\1", value).replace("%", "%%")


@exit_2_on_user_error
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(argv)
    lines, left = chosen(dict(os.environ))
    try:
        before = Path(NAME).read_text().splitlines() if Path(NAME).exists() else []
        by_hand = [line for line in before if "=" in line and not ours(line.split("=")[0])]
        gone = sorted({line.split("=")[0] for line in before if "=" in line} - {line.split("=")[0] for line in lines + by_hand})
        lines += by_hand
        # DeepSpeed takes every line for NAME=VALUE: no comment can stand in the file
        with whole_file(Path(NAME)) as file:
            os.fchmod(file.fileno(), 0o600)
            file.write("".join(f"{line}\n" for line in lines).encode())
    except OSError as error:
        raise UserError(f"{Path(NAME).resolve()} cannot be written ({error.strerror}): start it in the folder in which deepspeed is then started") from None
    print(f"{Path(NAME).resolve()}: {len(lines)} variables: {' '.join(line.split('=')[0] for line in lines)}")
    if gone:
        print(f"no longer in it, since this shell has no such variable, or its value is left out: {' '.join(gone)}")
    for name, why in left.items():
        print(f"left out: {name} ({why})")


if __name__ == "__main__":
    main(sys.argv[1:])
