"""Versions, compiled ops and what compiles them."""

import ast
import getpass
import hashlib
import importlib.metadata
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from shlex import quote

from packaging.requirements import Requirement

from toolkit.doctor.disk import NETWORK, file_system, refuses_writing
from toolkit.doctor.finding import Finding, error, ok, warning

ROOT = Path(__file__).resolve().parents[2]
SAID = ("torch", "deepspeed", "transformers", "peft", "numpy", "webdataset", "liger-kernel", "triton")
STALE = 300  # s without a new file in the folder: building cpu_adam took 63 s in all


def versions() -> dict[str, str]:
    """What must be the same on all ranks: python, the packages, and a digest of the toolkit's own code."""
    code = hashlib.sha256(b"".join(path.read_bytes() for path in sorted((ROOT / "toolkit").rglob("*.py")))).hexdigest()[:12]
    found = {name: version for name in {*SAID, *(wanted.name for wanted in _wanted())} if (version := _version(name))}
    return {"python": platform.python_version(), **dict(sorted(found.items())), "toolkit code": code}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _wanted() -> list[Requirement]:
    """install_requires of setup.py, or where only the package is installed what that says."""
    setup = ROOT / "setup.py"
    if not setup.is_file():
        return [one for text in importlib.metadata.requires("heartspeed") or () if not (one := Requirement(text)).marker]
    call = next(node for node in ast.walk(ast.parse(setup.read_text())) if isinstance(node, ast.keyword) and node.arg == "install_requires")
    return [Requirement(text) for text in ast.literal_eval(call.value)]


def check_versions() -> Iterator[Finding]:
    """Installed packages against the ranges of setup.py."""
    wrong = []
    for wanted in _wanted():
        version = _version(wanted.name)
        if version is None:
            wrong.append(f"{wanted.name} is not installed")
        elif not wanted.specifier.contains(version, prereleases=True):
            wrong.append(f"{wanted.name} {version} is not {wanted.specifier}")
    if wrong:
        yield error("versions", "; ".join(wrong), "pip install -r requirements.lock")
    else:
        has = versions()
        said = ", ".join(f"{name} {has[name]}" for name in ("python", *SAID) if name in has)
        yield ok("versions", f"{said}; all {len(_wanted())} packages as setup.py wants them")


def check_ops() -> Iterator[Finding]:
    """Locks that a killed build of an op left behind: later runs that need the op wait for them without a word (torch.utils.cpp_extension)."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")
    locks = [*root.glob("*/lock"), *root.glob("*/*/lock")] if root.is_dir() else []  # without the variable there is a folder per Python and CUDA between
    for lock in locks:
        op = lock.parent
        silent = time.time() - max(path.stat().st_mtime for path in (lock, *op.iterdir()))
        holders = _holders(lock)
        if holders:
            yield warning("compiled ops", f"{op} is being built by process {holders[0]}", "wait until it is built")
        elif silent > STALE and file_system(op) in NETWORK:
            yield warning(
                "compiled ops", f"{lock} is {silent / 60:.0f} minutes old, on a network file system: the process that has it may live on another node",
                f"pgrep -u $USER -fl ninja on the nodes that use it; where none builds: rm -r {quote(str(op))}",
            )  # fmt: skip
        elif silent > STALE:
            yield error(
                "compiled ops", f"{lock} was left by a killed build, {silent / 60:.0f} minutes ago: the next run that needs the op waits for ever",
                f"rm -r {quote(str(op))}",
            )  # fmt: skip
        else:
            yield warning(
                "compiled ops",
                f"{lock} is {silent:.0f} s old and held by no process of this machine",
                f"wait {STALE // 60} minutes; if it is still there: rm -r {quote(str(op))}",
            )
    if not locks:
        built = sorted({path.parent.name for path in root.rglob("*.so")}) if root.is_dir() else []
        yield ok("compiled ops", f"no build lock in {root}, built there: {', '.join(built) or 'nothing'}; the trainers need no compiled op")


def _holders(path: Path) -> list[int]:
    """Processes of this machine that have the file open, as a builder has its lock as long as it lives."""
    found, wanted = [], path.stat()
    for handles in Path("/proc").glob("[0-9]*/fd"):
        try:
            inodes = [(stat.st_dev, stat.st_ino) for name in os.listdir(handles) if (stat := _stat(handles / name))]
        except OSError:  # another user's, or it ended
            continue
        if (wanted.st_dev, wanted.st_ino) in inodes:
            found.append(int(handles.parent.name))
    return found


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None


def check_compiler(gpu: bool) -> Iterator[Finding]:
    """Triton compiles its kernels' launchers with a C compiler, torch.compile on CPUs its kernels with a C++ compiler."""
    c, cpp = (next(filter(None, map(shutil.which, names)), None) for names in (("gcc", "cc", "clang"), (os.environ.get("CXX", "g++"), "clang++")))
    if gpu and not c:
        yield error("compiler", "no C compiler: Liger's kernels and --compile need one on GPUs", "apt-get install gcc, or --kernels eager without --compile")
    elif not gpu and not cpp:
        yield warning("compiler", "no C++ compiler: --compile true will not run; all else needs none", "apt-get install g++, or leave --compile out")
    else:
        yield ok("compiler", f"{c if gpu else cpp}; needed by {'Liger kernels and ' if gpu else ''}--compile alone")


def check_caches() -> Iterator[Finding]:
    """Folders that torch.compile and Triton write to."""
    triton = Path(os.environ.get("TRITON_CACHE_DIR") or Path(os.environ.get("TRITON_HOME") or Path.home()) / ".triton" / "cache")
    inductor = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}")
    bad = False
    for path, variable in ((triton, "TRITON_CACHE_DIR"), (inductor, "TORCHINDUCTOR_CACHE_DIR")):
        mend = f"export {variable}={quote(f'/tmp/{path.name}')}"
        if reason := refuses_writing(path):
            bad = True
            yield error("caches", f"{path} cannot be written ({reason})", mend)
        elif (kind := file_system(path)) in NETWORK:
            bad = True
            yield warning("caches", f"{path} is on a network file system ({kind}), slow for many ranks at once", mend)
    if not bad:
        yield ok("caches", f"{triton} and {inductor} can be written")
