"""Two nodes without SLURM: `deepspeed --hostfile` over pdsh and ssh, where .deepspeed_env carries the environment, and with --no_ssh on each node."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from launchers.deepspeed_env import NAME, chosen, main
from tests.training.conftest import fork, losses  # noqa: F401  a fixture
from toolkit.training.distributed import RANK_VARIABLES

ROOT = Path(__file__).resolve().parents[2]
PORT = 29650  # of the nodes' own network: nothing else is there
STEPS = 4
VALUE = "a b;'c' \"d\" $HOME `id` \\n %h %n"  # DeepSpeed puts it between double quotes, a shell reads it, pdsh reads %h


def argv(corpus, out: Path) -> list:
    model = ["--backbone", corpus / "backbone", "--shards", corpus / "shards", "--seq_len", 700, "--report_targets", "no", "--precision", "fp32"]
    run = ["--output_dir", out, "--max_steps", STEPS, "--logging_steps", 1, "--max_eval_samples", 4, "--warmup_steps", 1]
    return ["--deepspeed", ROOT / "ds_configs" / "zero2.json", *model, *run]


@pytest.fixture(scope="module")
def reference(corpus, fork, tmp_path_factory) -> dict[int, float]:  # noqa: F811
    """step -> loss of the same run on one machine, in two ranks without any launcher."""
    out = tmp_path_factory.mktemp("one_machine")
    started = fork(2, argv(corpus, out / "run"), out / "log")
    assert started.wait() == [0, 0], started.text()
    return losses(out / "run")


@pytest.fixture
def here(tmp_path):
    """A folder with a hostfile, and the environment of a user's shell: their own variables in it, those of a rank not."""
    (tmp_path / "hosts").write_text("n1 slots=1\nn2 slots=1\n")
    inherited = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES and not name.startswith("SLURM_")}
    own = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TORCH_ANY": VALUE, "NOT_NAMED": "stays", "HF_TOKEN": "hf_secret"}
    return tmp_path, {**inherited, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HOME": str(tmp_path), **own}


def deepspeed(*more) -> list:
    return ["deepspeed", "--hostfile", "hosts", "--master_port", PORT, *more, ROOT / "launchers" / "pretrain.py"]


@pytest.mark.multinode
def test_no_ssh_each_node_starts_its_own_launcher(nodes, corpus, reference, here):
    folder, environment = here
    processes = []
    for rank, node in enumerate(nodes.names):
        words = deepspeed("--no_ssh", "--node_rank", rank, "--master_addr", "n1") + argv(corpus, folder / "run")
        with open(folder / f"{node}.log", "w") as log:
            processes.append(nodes.popen(node, words, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT))
    codes = [process.wait(200) for process in processes]
    assert codes == [0, 0], "".join((folder / f"{node}.log").read_text()[-3000:] for node in nodes.names)
    assert len(reference) == STEPS and losses(folder / "run") == pytest.approx(reference, abs=1e-6)


@pytest.fixture
def sshd(nodes):
    """An ssh server on each node."""
    if absent := [program for program in ("pdsh", "ssh", "ssh-keygen", "/usr/sbin/sshd") if not shutil.which(program)]:
        pytest.skip(f"{', '.join(absent)} not installed (apt-get install pdsh openssh-server)")
    servers = [nodes.popen(node, ["/usr/sbin/sshd", "-D", "-e"], stderr=subprocess.DEVNULL) for node in nodes.names]
    deadline = time.monotonic() + 30
    while any(nodes.run("head", ["ssh", node, "true"]).returncode for node in nodes.names):
        assert time.monotonic() < deadline, "no ssh to the nodes"
        time.sleep(0.1)
    yield
    for server in servers:
        server.terminate()
        server.wait(30)


def environment_of_a_rank(nodes, node: str) -> dict[str, str] | None:
    for process in nodes.processes(node):
        try:
            if {"--local_rank=0", str(ROOT / "launchers" / "pretrain.py")} <= set(process.cmdline()) and "RANK" in process.environ():
                return process.environ()
        except psutil.Error:  # it has just ended
            continue
    return None


@pytest.mark.multinode
def test_over_ssh_the_variables_of_deepspeed_env_reach_the_ranks(nodes, sshd, corpus, reference, here):
    """HOME is a folder of its own: DeepSpeed reads a .deepspeed_env of the home folder too."""
    folder, environment = here
    said = nodes.run("head", [sys.executable, ROOT / "launchers" / "deepspeed_env.py"], cwd=folder, env=environment)
    assert said.returncode == 0 and "left out: HF_TOKEN (a secret" in said.stdout and (folder / NAME).stat().st_mode & 0o777 == 0o600
    assert "hf_secret" not in (folder / NAME).read_text()
    found = {}
    with open(folder / "log", "w") as log:
        words = deepspeed() + argv(corpus, folder / "run")
        process = nodes.popen("head", words, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 200
        while process.poll() is None and time.monotonic() < deadline:
            for node in set(nodes.names) - found.keys():
                if environ := environment_of_a_rank(nodes, node):
                    found[node] = environ
            time.sleep(0.2)
    assert process.wait(1) == 0, (folder / "log").read_text()[-4000:]
    for node, rank in (("n1", "0"), ("n2", "1")):
        variables = {name: found[node].get(name) for name in ("RANK", "TORCH_ANY", "DS_ACCELERATOR", "OMP_NUM_THREADS", "PATH", "NOT_NAMED", "HF_TOKEN")}
        named = {"TORCH_ANY": VALUE, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PATH": environment["PATH"]}
        assert variables == {"RANK": rank, **named, "NOT_NAMED": None, "HF_TOKEN": None}
    assert losses(folder / "run") == pytest.approx(reference, abs=1e-6)


def test_what_is_chosen_and_what_is_left_out():
    lines, left = chosen({
        "OMP_NUM_THREADS": "4", "NCCL_SOCKET_IFNAME": "ib0", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "0", "CUDA_HOME": "/usr/local/cuda",
        "HF_HOME": "/my models", "HF_TOKEN": "x", "TORCH_API_KEY": "x", "https_proxy": "http://me:word@proxy:1", "http_proxy": "http://proxy:1",
        "HF_AUTH": "x", "DS_PASSPHRASE": "x", "http_PROXY": "x", "HTTP_PROXY": "me:word@proxy:1", "HF_ENDPOINT": "https://hub/?token=x", "DS_Secret_ONE": "x",
        "HF_PW": "x", "DS_PWD": "x", "HF_BEARER": "x", "HF_HUB": "https://s3/a?X-Amz-Credential=A&X-Amz-Signature=B", "HF_HUB_TWO": "https://h/?a=1&access_token=x",
        "TRITON_CACHE_DIR": "", "DS_MESSAGE": "two\nlines", "HOME": "/root", "AWS_SECRET_ACCESS_KEY": "x", "RANK": "3",
    })  # fmt: skip
    assert lines == ["CUDA_HOME=/usr/local/cuda", "HF_HOME=/my models", "NCCL_SOCKET_IFNAME=ib0", "OMP_NUM_THREADS=4", "TOKENIZERS_PARALLELISM=false",
                     "http_proxy=http://proxy:1"]  # fmt: skip
    secret = {"HF_TOKEN", "TORCH_API_KEY", "https_proxy", "HF_AUTH", "DS_PASSPHRASE", "HTTP_PROXY", "HF_ENDPOINT", "DS_Secret_ONE"}
    secret |= {"HF_PW", "DS_PWD", "HF_BEARER", "HF_HUB", "HF_HUB_TWO"}
    assert left.keys() == secret | {"TRITON_CACHE_DIR", "DS_MESSAGE"} and all("a secret" in left[name] for name in secret)


def test_a_file_that_others_could_read_becomes_the_users_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", "/models")
    monkeypatch.delenv("DS_OLD", raising=False)
    (tmp_path / NAME).write_text("DS_OLD=1\n" * 100 + "MY_OWN=2\n")
    (tmp_path / NAME).chmod(0o644)
    main([])
    assert (tmp_path / NAME).stat().st_mode & 0o777 == 0o600 and "HF_HOME=/models\n" in (tmp_path / NAME).read_text()
    said = capsys.readouterr().out
    assert "OLD" not in (tmp_path / NAME).read_text() and f"{tmp_path / NAME}: " in said and "no longer in it" in said and ": DS_OLD\n" in said
    assert (tmp_path / NAME).read_text().endswith("MY_OWN=2\n")  # put there by hand: stays
    (tmp_path / NAME).unlink()
    (tmp_path / NAME).mkdir()
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2 and "cannot be written (Is a directory)" in capsys.readouterr().err
