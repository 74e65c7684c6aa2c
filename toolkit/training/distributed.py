"""Ranks: start them, agree, and leave with an exit code that scripts can use."""

import errno
import functools
import os
import signal
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import deepspeed
import huggingface_hub
import torch
import torch.distributed as dist
import transformers
from deepspeed import ops
from deepspeed.accelerator import get_accelerator

from toolkit.errors import UserError
from toolkit.training import slurm
from toolkit.training.stop import REQUEUE, Requeue

# what tells a process its place; a process started by a rank that is none itself must not inherit them
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_STEP_ID")


@dataclass(frozen=True)
class Ranks:
    """This process among all: `device` is where its model lives."""

    rank: int
    world: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0


def take_place() -> None:
    """Where no launcher has said which rank this is, srun may have."""
    if "RANK" in os.environ or not (place := slurm.place(os.environ)):
        return
    os.environ.update(place)
    if get_accelerator().device_name() != "cpu" and get_accelerator().device_count() == 1:
        os.environ["LOCAL_RANK"] = "0"  # with srun --gpus-per-task=1 each rank sees its own GPU alone


def start() -> Ranks:
    """Join the process group that the launcher or srun describes (alone without either), nccl on GPUs and gloo on CPUs."""
    take_place()
    # a run without a launcher is alone; port 0 is any that is free, found and taken in one (found first, it was once gone when it was taken)
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        os.environ.setdefault(name, value)
    accelerator, local = get_accelerator(), int(os.environ["LOCAL_RANK"])
    if accelerator.device_name() == "cpu":
        # this op serves inference alone; building it takes 40 s, and a killed build makes later runs hang on its lock
        ops.__compatible_ops__["deepspeed_shm_comm"] = False
        local_world = int(os.environ.get("LOCAL_SIZE", os.environ["WORLD_SIZE"]))
        if "OMP_NUM_THREADS" not in os.environ:
            cores = len(os.sched_getaffinity(0))
            torch.set_num_threads(max(1, cores if slurm.bound(os.environ, cores) else cores // local_world))
        device = torch.device("cpu")
    else:
        accelerator.set_device(local)
        device = torch.device(accelerator.device_name(local))
    if not dist.is_initialized():
        deepspeed.init_distributed("gloo" if device.type == "cpu" else None, verbose=False)
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


def bf16_is_fast() -> bool:
    """GPUs since Ampere; CPUs with AVX-512 BF16 or AMX (elsewhere bf16 is emulated, slower than fp32)."""
    if get_accelerator().device_name() != "cpu":
        cuda = get_accelerator().device_name() == "cuda"
        return torch.cuda.is_bf16_supported(including_emulation=False) if cuda else get_accelerator().is_bf16_supported()
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and any(flag in cpuinfo.read_text() for flag in ("avx512_bf16", "amx_bf16"))


def wants_bf16(args) -> bool:
    """Whether --precision means bf16 on this machine."""
    return args.precision == "bf16" or (args.precision == "auto" and bf16_is_fast())


def sum_over_ranks(values: list[float], device: torch.device) -> list[float]:
    """Element-wise sum over all ranks, in float64."""
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return tensor.tolist()


def launcher(main):
    """Decorate a launcher's `main()`: a UserError is one line from rank 0 and exit code 2 on every rank, a run that was saved on request ends with 85."""

    @functools.wraps(main)
    def wrapped():
        # what the libraries say of each other's calls, and a bar per loaded file, are not for a user
        warnings.filterwarnings("ignore", "`torch.distributed.*is deprecated", FutureWarning)  # torch 2.13 of DeepSpeed 0.19
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # transformers 5.23 of peft 0.21
        transformers.utils.logging.disable_progress_bar()
        huggingface_hub.logging.set_verbosity_error()  # a hub that cannot be reached is said once, by the error
        take_place()
        code = 0
        try:
            main()
        except (UserError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                raise
            rank = os.environ.get("RANK", "0")
            if rank != "0":
                time.sleep(3)  # rank 0 has most likely the same to say, and the launcher then ends the others before they repeat it
            print(f"error: {error}" + (f" (rank {rank})" if rank != "0" else ""), file=sys.stderr, flush=True)
            os._exit(2)  # not sys.exit: other ranks may wait in a collective, and leaving the group would wait for them
        except Requeue:
            code = REQUEUE
            # All ranks have saved. The first one to leave is a failure to `srun -K` and to DeepSpeed's launcher, which then send the others SIGTERM
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if dist.is_initialized():
            dist.destroy_process_group()
        if code:
            sys.exit(code)

    return wrapped
