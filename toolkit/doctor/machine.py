"""This node: accelerator, processor, memory, limits of the system, ports and names."""

import os
import resource
import socket
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch
from deepspeed.accelerator import get_accelerator

from toolkit.doctor.finding import Finding, error, ok, warning
from toolkit.shards.reader import OPEN_MAPS
from toolkit.training.distributed import bf16_is_fast

FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
PORT = 29500  # of the deepspeed launcher, if it is told of no other
SHARED = 1 << 30  # bytes of /dev/shm that NVIDIA's containers are started with (--shm-size=1g); docker alone gives 64 MB
FILES = 256  # libraries, sockets and logs beside the maps of shards


def check_accelerator(local_rank: int) -> Iterator[Finding]:
    """GPUs: names, memory, driver, bf16. A GPU that torch does not see is an error."""
    driver = Path("/proc/driver/nvidia/version")
    name = get_accelerator().device_name()
    if name == "cpu":
        if driver.exists() and os.environ.get("DS_ACCELERATOR") != "cpu":
            yield error(
                "accelerator", f"there is an NVIDIA driver, but torch {torch.__version__} (CUDA {torch.version.cuda or 'not built in'}) sees no GPU",
                "nvidia-smi (does the node see it?), CUDA_VISIBLE_DEVICES, and a torch with CUDA: pip install -r requirements.lock",
            )  # fmt: skip
        else:
            yield ok("accelerator", "CPU: ranks talk over gloo")
        return
    if name != "cuda":
        yield warning("accelerator", f"{get_accelerator().device_count()} {name}: untried", "try benchmarks first")
        return
    count = torch.cuda.device_count()
    if local_rank >= count:
        yield error(
            "accelerator",
            f"local rank {local_rank} has no GPU: the node shows {count}",
            f"deepspeed --num_gpus {count}, or ask SLURM for more (--gpus-per-node)",
        )
        return
    device = torch.cuda.get_device_properties(local_rank)
    free, total = torch.cuda.mem_get_info(local_rank)
    version = next((word for word in driver.read_text().split() if word[0].isdigit() and "." in word), "unknown") if driver.exists() else "unknown"
    said = f"{count} GPUs, {device.name}, {total / 1e9:.1f} GB, driver {version}, CUDA {torch.version.cuda}, bf16 {'yes' if bf16_is_fast() else 'emulated'}"
    if free < 0.9 * total:
        yield warning("accelerator", f"{said}: {free / 1e9:.1f} GB free alone, others use it", "nvidia-smi names the processes: end them or take another GPU")
    elif not bf16_is_fast():
        yield warning("accelerator", f"{said}: --precision auto is fp32 here", "GPUs since Ampere compute in bf16")
    else:
        yield ok("accelerator", said)


def check_processor(local_world: int, started: bool) -> Iterator[Finding]:
    """Cores this process may use, against the ranks of the node and their threads. started: by a launcher, as a run will be."""
    cores, threads = len(os.sched_getaffinity(0)), os.environ.get("OMP_NUM_THREADS")
    flags = set((Path("/proc/cpuinfo").read_text().split("flags", 1) + [""])[1].split("\n", 1)[0].split())
    has = ", ".join(flag.upper() for flag in FLAGS if flag in flags) or "no AVX2"
    said = f"{cores} of {os.cpu_count()} cores for {local_world} rank{'s' * (local_world > 1)}, OMP_NUM_THREADS {threads or 'not set'}, {has}"
    on_cpu = get_accelerator().device_name() == "cpu"
    if cores < local_world:
        yield warning("processor", f"{said}: ranks share cores", "fewer ranks, or ask SLURM for more cores (--cpus-per-task)")
    elif threads and threads.isdigit() and int(threads) * local_world > cores:
        yield warning("processor", f"{said}: {int(threads) * local_world} threads on {cores} cores", f"export OMP_NUM_THREADS={cores // local_world}")
    elif on_cpu and started and threads and threads.isdigit() and int(threads) * local_world * 2 <= cores:
        yield warning("processor", f"{said}: half of the cores or more are idle", f"export OMP_NUM_THREADS={cores // local_world}")
    else:
        yield ok("processor", f"{said}; bf16 is {'fast' if bf16_is_fast() else 'emulated'} on this {'CPU' if on_cpu else 'accelerator'}")


def check_memory() -> Iterator[Finding]:
    """What is free of the node's memory, or of what the container or the SLURM job may use of it."""
    memory = psutil.virtual_memory()
    limit, used = (_cgroup(name) for name in ("memory.max", "memory.current"))
    free = min(memory.available, limit - used) if limit is not None and used is not None else memory.available
    said = f"{free / 1e9:.1f} of {memory.total / 1e9:.1f} GB free" + (f", this job may use {limit / 1e9:.1f} GB" if limit else "")
    if free < 2e9:
        yield warning("memory", said, "end other programs, or ask SLURM for more (--mem)")
    else:
        yield ok("memory", said)


def _cgroup(name: str) -> int | None:
    """A number of this process's control group (v2), None where there is none or it says `max`."""
    try:
        group = Path("/proc/self/cgroup").read_text().strip().rpartition("::")[2]
        text = (Path("/sys/fs/cgroup") / group.strip("/") / name).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def check_shared_memory(gpu: bool) -> Iterator[Finding]:
    """/dev/shm: NCCL passes data between the GPUs of a node through it, and worker processes of sharding their locks. The loaders need none of it."""
    space = os.statvfs("/dev/shm")
    free, total = space.f_bavail * space.f_frsize, space.f_blocks * space.f_frsize
    said = f"/dev/shm: {free / 1e6:,.1f} of {total / 1e6:,.1f} MB free"
    if free < 1 << 20:
        yield error("shared memory", f"{said}: full", "delete what killed programs left in it: ls -l /dev/shm")
    elif gpu and free < SHARED:
        yield warning("shared memory", f"{said}, NCCL wants some MB a pair of GPUs", "docker run --shm-size=1g, or mount -o remount,size=4g /dev/shm")
    else:
        yield ok("shared memory", f"{said}; the loaders need none")


def check_open_files(world: int) -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    need = OPEN_MAPS + FILES + 2 * world  # a rank has a socket to each other of a group
    if 0 <= soft < need:
        more = f"ulimit -n {min(hard, 65536) if hard >= 0 else 65536}" if hard < 0 or hard >= need else "raise nofile in /etc/security/limits.conf"
        yield error("open files", f"{soft:,} files may be open, a rank needs up to {need:,} ({OPEN_MAPS} shards are mapped at a time)", more)
    else:
        yield ok("open files", f"{'any number of' if soft < 0 else f'{soft:,}'} files may be open, a rank needs up to {need:,}")


def check_locked_memory() -> Iterator[Finding]:
    """InfiniBand's adapters read and write memory that is locked; without one nothing is found."""
    adapters = sorted(os.listdir("/sys/class/infiniband")) if os.path.isdir("/sys/class/infiniband") else []
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if adapters and locked < 0:
        yield ok("locked memory", f"not limited, for {', '.join(adapters)}")
    elif adapters:
        yield warning(
            "locked memory", f"{locked / 1e6:.1f} MB may be locked, {', '.join(adapters)} registers NCCL's buffers in it",
            "ulimit -l unlimited (in containers --ulimit memlock=-1; under SLURM PropagateResourceLimitsExcept=MEMLOCK)",
        )  # fmt: skip


def check_processes() -> Iterator[Finding]:
    """How many more processes and threads this user and this container may start."""
    may, now = _cgroup("pids.max"), _cgroup("pids.current")
    left = [may - now] if may is not None and now is not None else []
    soft = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    if os.geteuid() and soft >= 0:  # root is not bound by it
        mine = [process.info for process in psutil.process_iter(["uids", "num_threads"])]
        left.append(soft - sum(one["num_threads"] or 0 for one in mine if one["uids"] and one["uids"].real == os.getuid()))
    if left and min(left) < 64 * os.cpu_count():  # torch, gloo and NCCL have some threads a core and rank
        yield warning(
            "processes", f"{min(left):,} more processes and threads may be started", "ulimit -u 65536, or a larger limit of the container (--pids-limit)"
        )
    else:
        yield ok("processes", f"{f'{min(left):,}' if left else 'any number of'} more processes and threads may be started")


def check_ports(rank: int, world: int) -> Iterator[Finding]:
    """MASTER_PORT on the node of rank 0, and the launcher's own choice where none is named. To be looked at before the ranks join."""
    given = os.environ.get("MASTER_PORT", "0")
    if world > 1 and (rank or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"):  # the port is another node's, or torchrun has it already
        return
    if given != "0" and (not given.isdigit() or int(given) > 65535):
        yield error("ports", f"MASTER_PORT {given!r} is no port", "deepspeed --master_port with a number from 1024 to 65535")
    elif given != "0":
        if taken := _taken(int(given)):
            yield error("ports", f"MASTER_PORT {given} is taken by {taken}", "deepspeed --master_port with another number, or end that process")
        else:
            yield ok("ports", f"MASTER_PORT {given} is free")
    elif taken := _taken(PORT):
        yield warning("ports", f"{PORT}, the port of the deepspeed launcher, is taken by {taken}", f"deepspeed --master_port {_free()}")
    else:
        yield ok("ports", f"{PORT}, the port of the deepspeed launcher, is free")


def _taken(port: int) -> str | None:
    """Who listens on a TCP port of this node, None if it can be bound."""
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as TCPStore does: the end of an earlier run must not count
        if family == socket.AF_INET6:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        try:
            probe.bind(("", port))
        except OSError:
            pass
        else:
            return None
    for connection in psutil.net_connections("tcp"):
        if connection.laddr and connection.laddr.port == port and connection.pid:
            return f"process {connection.pid} ({psutil.Process(connection.pid).name()})"
    return "a process of another user"


def _free() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def check_names(several: bool) -> Iterator[Finding]:
    """MASTER_ADDR and this node's own name: ranks on other nodes must find both, and 127.x is another machine for each of them.

    several: whether the ranks are on several nodes.
    """
    own, master = socket.gethostname(), os.environ.get("MASTER_ADDR", "")
    bad = False
    for what, name in (("MASTER_ADDR", master), ("this node's name", own)):
        if not name:
            continue
        try:
            found = sorted({entry[4][0] for entry in socket.getaddrinfo(name, None)})
        except OSError as problem:
            bad = True
            tell = error if what == "MASTER_ADDR" else warning
            yield tell(
                "names",
                f"{what} {name} has no address ({problem.strerror or problem})",
                f"getent hosts {name}; add it to DNS or /etc/hosts, or name an address",
            )
            continue
        if several and all(address.startswith("127.") or address == "::1" for address in found):
            bad = True
            mend = (
                f"name its address: --master_addr {_address()}"
                if what == "MASTER_ADDR"
                else "export GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME (ip -br addr), or mend /etc/hosts"
            )
            tell = error if what == "MASTER_ADDR" else warning
            yield tell("names", f"{what} {name} is {found[0]} here, an address that other nodes cannot reach", mend)
    if not bad:
        yield ok("names", f"this node is {own}" + (f", MASTER_ADDR {master} has an address" if master else ""))


def _address() -> str:
    """The first address of this node that others can reach."""
    found = [a.address for of in psutil.net_if_addrs().values() for a in of if a.family == socket.AF_INET and not a.address.startswith("127.")]
    return found[0] if found else "ADDRESS"
