"""A real SLURM on the nodes of tests/cluster/nodes.py: munged and slurmctld on the head, a slurmd on n1 and n2. All its files are in the cluster's folder."""

import os
import pwd
import shutil
import signal
import sys
import time
from pathlib import Path

import psutil

from tests.cluster.nodes import HEAD, NAMES, Nodes
from toolkit.training.distributed import RANK_VARIABLES

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "runuser")
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
# cred_expire: a requeued job starts again when its old credential is no longer valid, by default after 120 s.
# Partition low is preempted by high: SIGTERM, and 30 s later SIGKILL and back into the queue
CONF = """ClusterName=test
SlurmctldHost=head({address[head]})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
SlurmctldPort=16817
SlurmdPort=16818
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
MinJobAge=3600
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobCompType=jobcomp/none
SlurmdParameters=config_overrides
NodeName=n1 NodeAddr={address[n1]} CPUs=2 RealMemory=8000 State=UNKNOWN
NodeName=n2 NodeAddr={address[n2]} CPUs=2 RealMemory=8000 State=UNKNOWN
PartitionName=low Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=high Nodes=n1,n2 MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str | None:
    """What SLURM needs and is not here, or None."""
    absent = [name for name in NEEDED if not shutil.which(name)]
    return f"{', '.join(absent)} not installed (apt-get install slurmctld slurmd slurm-client munge)" if absent else None


class Slurm:
    """Jobs are submitted on the head, in the project's root, with this process's environment less what makes a process a rank or a part of a job."""

    def __init__(self, nodes: Nodes) -> None:
        self.nodes, self.folder = nodes, nodes.folder / "slurm"
        for name in ("state", "munge", *(f"spool.{node}" for node in NAMES)):
            (self.folder / name).mkdir(parents=True)
        (self.folder / "slurm.conf").write_text(CONF.format(folder=self.folder, address=nodes.address))
        bare = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_", "PYTEST_")) and name not in RANK_VARIABLES}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.environment = bare | {"SLURM_CONF": str(self.folder / "slurm.conf"), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PATH": path}
        self._munge(self.folder / "munge")
        self.start_controller()
        for node in NAMES:
            nodes.run(node, ["slurmd", "-f", self.folder / "slurm.conf", "-N", node], check=True)
        until = time.monotonic() + 60
        while self.call("sinfo", "-h", "-N", "-p", "low", "-o", "%T", check=False).split() != ["idle", "idle"]:
            assert time.monotonic() < until, "the nodes do not come up:\n" + (self.folder / "slurmctld.log").read_text()[-2000:]
            time.sleep(0.1)

    def start_controller(self) -> None:
        self.nodes.run(HEAD, ["slurmctld", "-f", self.folder / "slurm.conf"], check=True)

    def stop_controller(self) -> None:
        """Jobs run on, and wait to be asked for."""
        pid = int((self.folder / "slurmctld.pid").read_text())
        os.kill(pid, signal.SIGTERM)
        psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [])

    def _munge(self, folder: Path) -> None:
        """munged with a key and a socket of its own; as user munge, since it refuses folders that another could write."""
        (folder / "key").write_bytes(os.urandom(256))
        owner = pwd.getpwnam("munge")
        for path, mode in ((folder / "key", 0o400), (folder, 0o711)):
            os.chown(path, owner.pw_uid, owner.pw_gid)
            path.chmod(mode)
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        self.nodes.run(HEAD, ["runuser", "-u", "munge", "--", "munged", *(f"--{name}={folder / file}" for name, file in files.items())], check=True)

    def call(self, *words, check: bool = True, **environment) -> str:
        """stdout of a command on the head."""
        done = self.nodes.run(HEAD, words, env=self.environment | environment, cwd=ROOT)
        assert not check or done.returncode == 0, f"{' '.join(map(str, words))}: {done.returncode} {done.stderr}{done.stdout}"
        return done.stdout

    def submit(self, *words, **environment) -> str:
        """sbatch; returns the job's number."""
        return self.call("sbatch", "--parsable", *words, **environment).split(";")[0].strip()

    def show(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says: JobState, Restarts, ExitCode, ..."""
        words = self.call("scontrol", "show", "job", "-o", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, job: str, *states: str, seconds: float = 300) -> dict[str, str]:
        """Wait until the job is in one of the states; what `show` says then. Fails at once if the job is over."""
        until = time.monotonic() + seconds
        while (shown := self.show(job))["JobState"] not in states:
            assert time.monotonic() < until and shown["JobState"] not in OVER, (
                f"job {job} is {shown['JobState']} ({shown['Reason']}), not {' or '.join(states)}"
            )
            time.sleep(0.1)
        return shown

    def close(self) -> None:
        """End all jobs; the daemons end with their nodes."""
        self.call("scancel", "--user=root", check=False)
