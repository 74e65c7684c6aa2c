"""A head and two nodes on this machine: network namespaces, joined by a bridge, each with its own host name, /etc/hosts and /etc/ssh.

Nothing of the machine's own network changes: the bridge lives in the head's namespace. The names hold the pid of the test session, so that two
sessions do not meet, and a session holds a lock of its folder: what is not locked was left by a killed one, and a later one removes it.
"""

import fcntl
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil

HEAD, NAMES, ADDRESS = "head", ("n1", "n2"), "10.77.0."
PREFIX = "hsnode"
NEEDED = ("ip", "nsenter", "unshare")
SSH = """Host *
  IdentityFile {folder}/id
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
  BatchMode yes
"""
SSHD = """Port 22
HostKey {folder}/host
AuthorizedKeysFile {folder}/id.pub
PermitRootLogin prohibit-password
PasswordAuthentication no
UsePAM no
StrictModes no
PidFile none
"""
# not `ip netns exec`: it mounts /sys anew, without the cgroups that slurmd wants to see. All of it is exec: the pid is that of the command
ENTER = 'hostname "$0"; mount --bind "$1/hosts" /etc/hosts; if [ -d "$1/ssh" ]; then mount --bind "$1/ssh" /etc/ssh; fi; shift; exec "$@"'


def missing() -> str | None:
    """What keeps nodes from being made here, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    absent = [name for name in NEEDED if not shutil.which(name)]
    if absent:
        return f"{', '.join(absent)} not installed (apt-get install iproute2 util-linux)"
    trial = subprocess.run(["unshare", "--net", "--uts", "--mount", "ip", "link", "set", "lo", "up"], capture_output=True, text=True)
    return f"namespaces are not allowed here ({trial.stderr.strip()})" if trial.returncode else None


class Nodes:
    """`names` of the nodes (n1, n2; beside them "head"), `address` of each, `folder` for files of this cluster (readable by every user)."""

    def __init__(self) -> None:
        _sweep()
        self.names, self.prefix = NAMES, f"{PREFIX}{os.getpid()}"
        self.folder = Path("/tmp", self.prefix)  # short: a unix socket's path has 108 characters at most
        self.folder.mkdir()
        self._lock = _lock(self.folder)
        self.address = {HEAD: f"{ADDRESS}1", **{name: f"{ADDRESS}{11 + i}" for i, name in enumerate(NAMES)}}
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in self.address.items())]
        (self.folder / "hosts").write_text("\n".join(lines) + "\n")
        if shutil.which("ssh-keygen"):
            self._keys(self.folder / "ssh")
        for name in self.address:
            _ip("netns", "add", f"{self.prefix}-{name}")
            _ip("-n", f"{self.prefix}-{name}", "link", "set", "lo", "up")
        head = f"{self.prefix}-{HEAD}"
        _ip("-n", head, "link", "add", "br0", "type", "bridge")
        _ip("-n", head, "addr", "add", f"{self.address[HEAD]}/24", "dev", "br0")
        _ip("-n", head, "link", "set", "br0", "up")
        for name in NAMES:
            space = f"{self.prefix}-{name}"
            _ip("-n", head, "link", "add", f"to-{name}", "type", "veth", "peer", "name", "eth0", "netns", space)
            _ip("-n", head, "link", "set", f"to-{name}", "master", "br0", "up")
            _ip("-n", space, "addr", "add", f"{self.address[name]}/24", "dev", "eth0")
            _ip("-n", space, "link", "set", "eth0", "up")

    def _keys(self, folder: Path) -> None:
        """What becomes /etc/ssh on the nodes: root may enter each from each. A test that wants ssh starts `/usr/sbin/sshd -D -e` on the nodes."""
        folder.mkdir(mode=0o700)
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd wants it; on a machine that never ran one it is not there
        for name in ("id", "host"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
        # they are read as /etc/ssh, where this folder then is
        (folder / "ssh_config").write_text(SSH.format(folder="/etc/ssh"))
        (folder / "sshd_config").write_text(SSHD.format(folder="/etc/ssh"))

    def command(self, node: str, words: list) -> list[str]:
        """The argv that runs `words` on a node ("head", "n1", "n2")."""
        space = f"--net=/run/netns/{self.prefix}-{node}"
        return ["nsenter", space, "unshare", "--uts", "--mount", "bash", "-c", ENTER, node, str(self.folder), *map(str, words)]

    def run(self, node: str, words: list, **more) -> subprocess.CompletedProcess:
        """subprocess.run on a node; output is captured as text unless `more` says otherwise."""
        return subprocess.run(self.command(node, words), **{"capture_output": True, "text": True, **more})

    def popen(self, node: str, words: list, **more) -> subprocess.Popen:
        """subprocess.Popen on a node; its pid is that of the command itself."""
        return subprocess.Popen(self.command(node, words), **more)

    def processes(self, node: str) -> list[psutil.Process]:
        """All that runs on a node."""
        return [psutil.Process(pid) for pid in _pids(f"{self.prefix}-{node}") if psutil.pid_exists(pid)]

    def close(self) -> None:
        """End all that runs on the nodes, and the nodes."""
        _remove([f"{self.prefix}-{name}" for name in self.address])
        shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


def _pids(space: str) -> list[int]:
    return [int(pid) for pid in _ip("netns", "pids", space).split()]


def _remove(spaces: list[str]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        for _ in range(20 if any(map(_pids, spaces)) else 0):
            for pid in (pid for space in spaces for pid in _pids(space)):
                try:
                    os.kill(pid, number)
                except ProcessLookupError:
                    pass
            if not any(map(_pids, spaces)):
                break
            time.sleep(0.1)
    for space in spaces:
        _ip("netns", "del", space)


def _spaces() -> list[str]:
    """The namespaces of all sessions."""
    return [line.split()[0] for line in _ip("netns", "list").splitlines() if line.startswith(PREFIX)]


def _sweep() -> None:
    """Remove the nodes of sessions that are no more, and their folders."""
    for name in {space.split("-")[0] for space in _spaces()} | {path.name for path in Path("/tmp").glob(f"{PREFIX}*")}:
        if (lock := _lock(Path("/tmp", name))) is not None:
            _remove([space for space in _spaces() if space.startswith(f"{name}-")])
            shutil.rmtree(Path("/tmp", name), ignore_errors=True)
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """Take the lock that a session has of its folder as long as it lives, whatever process has its pid later; None where one lives."""
    folder.mkdir(exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    return handle
