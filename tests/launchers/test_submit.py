"""launchers/submit.py: what it checks, the commands it renders, and what becomes of a chain that breaks off. Real SLURM: tests/cluster/test_slurm_chain.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from launchers import submit
from toolkit.recipe import load

ROOT = Path(__file__).resolve().parents[2]
SBATCH = """#!/bin/sh
echo "$0 $@" >> "$CALLS"; env > "$CALLS.env"
n=$(grep -c sbatch "$CALLS")
if [ "$n" = "$FAIL_AT" ]; then echo 'sbatch: error: Invalid partition specified: gpu' >&2; exit 1; fi
echo "10$n;cluster"
"""


@pytest.fixture
def line(tmp_path):
    """Path of a recipe of a whole line, whose own files are there; line.change(stage, key=value) writes it again."""
    for name in ("ptb-xl", "qa", "manifest"):
        (tmp_path / name).mkdir()
    sections = {
        "train_tokenizer": {"manifest": f"{tmp_path}/manifest", "output_dir": f"{tmp_path}/tokenizer", "deepspeed": "ds_configs/zero1.json"},
        "shard": {"source": "ptbxl", "root": f"{tmp_path}/ptb-xl", "tokenizer": f"{tmp_path}/tokenizer", "out": f"{tmp_path}/d"},
        "tasks": [{"kind": "ecgqa", "qa": f"{tmp_path}/qa", "out": f"{tmp_path}/tasks"}, {"kind": "reports", "out": f"{tmp_path}/tasks"}],
        "pretrain": {"backbone": "tiny", "shards": f"{tmp_path}/d/shards", "output_dir": f"{tmp_path}/p", "deepspeed": "ds_configs/zero2.json"},
        "instruct": {"backbone": f"{tmp_path}/p", "shards": [f"{tmp_path}/tasks"], "output_dir": f"{tmp_path}/l", "deepspeed": "ds_configs/zero2.json"},
        "evaluate": {"model": f"{tmp_path}/l", "shards": f"{tmp_path}/tasks", "output_dir": f"{tmp_path}/e"},
    }
    path = tmp_path / "all.yaml"

    def change(stage: str | None = None, without: str | None = None, **values) -> str:
        made = {name: section | values if name == stage else section for name, section in sections.items() if name != without}
        path.write_text(yaml.safe_dump(made, sort_keys=False))
        return str(path)

    change.path, change.folder = change(), tmp_path
    return change


@pytest.fixture(autouse=True)
def root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A fake sbatch and scancel that write down how they are called; cluster() reads it. The real ones are in tests/cluster."""
    (tmp_path / "bin").mkdir()
    for name, text in (("sbatch", SBATCH), ("scancel", '#!/bin/sh\necho "$0 $@" >> "$CALLS"\n')):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    for name, value in (("CALLS", str(tmp_path / "calls")), ("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}"), ("FAIL_AT", "")):
        monkeypatch.setenv(name, value)
        monkeypatch.setitem(submit.ENVIRONMENT, name, value)
    return lambda: (tmp_path / "calls").read_text().replace(f"{tmp_path}/bin/", "").splitlines()


def refused(capsys, *argv: str) -> str:
    """What is said of a mistake, one line."""
    with pytest.raises(SystemExit) as caught:
        submit.main([*argv])
    said = capsys.readouterr().err.strip().splitlines()
    assert caught.value.code == 2 and said[-1].startswith("error: ")
    return said[-1]


def test_a_whole_line_is_submitted_in_order_each_stage_after_the_one_before(line, cluster, capsys):
    submit.main([line.path, "--nodes", "4", "--partition", "gpu", "--time", "8:00:00", "--gpus_per_node", "8", "--shard_jobs", "3", "--", "--qos=long"])
    said, shared = capsys.readouterr(), "--partition=gpu --time=8:00:00 --qos=long"
    expected, before = [], ""
    for i, stage in enumerate(("train_tokenizer", "shard", "pretrain", "instruct", "evaluate"), 1):
        size = {"train_tokenizer": "--nodes=1 --gpus-per-node=1", "shard": "--nodes=1 --array=0-2"}.get(stage, "--nodes=4 --gpus-per-node=8")
        expected.append(f"sbatch --parsable {before}--job-name=all-{stage} {size} {shared} launchers/slurm/{stage}.sbatch {line.path}")
        before = f"--dependency=afterok:10{i} --kill-on-invalid-dep=yes "
    assert cluster() == expected and not said.err
    assert "squeue --jobs 101,102,103,104,105; logs slurm-all-*.out" in said.out and f"{line.folder}/p/logs" in said.out


def test_a_failure_in_the_middle_cancels_what_was_submitted(line, cluster, capsys, monkeypatch):
    monkeypatch.setitem(submit.ENVIRONMENT, "FAIL_AT", "3")
    assert refused(capsys, line.path, "--nodes", "1") == "error: stage pretrain: sbatch: error: Invalid partition specified: gpu"
    calls = cluster()
    assert len(calls) == 4 and calls[-1] == "scancel 101 102"


def test_jobs_that_could_not_be_cancelled_are_named(line, cluster, capsys, monkeypatch):
    monkeypatch.setitem(submit.ENVIRONMENT, "FAIL_AT", "3")
    (line.folder / "bin/scancel").write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(SystemExit):
        submit.main([line.path, "--nodes", "1"])
    said = capsys.readouterr().err
    assert "still queued, for scancel failed: scancel 101 102" in said and "nothing is left" not in said


def test_what_sbatch_says_beside_the_number_is_shown(line, cluster, capsys):
    (line.folder / "bin/sbatch").write_text(f"#!/bin/sh\necho 'sbatch: 12 GPU hours left' >&2; echo 'a line of the site'\n{SBATCH}")
    submit.main([line.path, "--nodes", "1", "--chain", "train_tokenizer"])
    said = capsys.readouterr()
    assert "12 GPU hours left" in said.err and "squeue --jobs 101;" in said.out


def test_jobs_do_not_inherit_what_this_program_sets_for_itself(line, cluster, tmp_path):
    """DS_ACCELERATOR=cpu would have them train on the CPUs of GPU nodes: sbatch hands its environment on."""
    inherited = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    command = [sys.executable, "launchers/submit.py", line.path, "--nodes", "1", "--chain", "shard"]
    done = subprocess.run(command, env=inherited, capture_output=True, text=True)
    assert done.returncode == 2 and "tokenizer is not there" in done.stderr  # a chain without the stage that makes it
    (tmp_path / "tokenizer").mkdir()
    done = subprocess.run(command, env=inherited, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    given = (tmp_path / "calls.env").read_text()
    assert "DS_ACCELERATOR" not in given and f"PATH={os.environ['PATH']}" in given


def test_a_dry_run_shows_the_plan_and_submits_nothing(line, cluster, tmp_path, capsys):
    submit.main([line.path, "--nodes", "2", "--dry-run", "--gpus_per_node", "8"])
    said = capsys.readouterr().out
    assert not (tmp_path / "calls").exists()
    assert "pretrain: 2 nodes of 8 ranks, 16 in all; after shard" in said and "shard: array of 8 jobs of one node; after train_tokenizer" in said
    assert "train_tokenizer: 1 node of 1 rank, 1 in all" in said
    assert f"writes  {tmp_path}/d/shards {tmp_path}/d/manifest {tmp_path}/tasks\n" in said
    assert "--dependency=afterok:ID_OF_instruct --kill-on-invalid-dep=yes --job-name=all-evaluate" in said
    submit.main([line.path, "--nodes", "1", "--dry-run", "--chain", "train_tokenizer,shard"])
    assert "pretrain" not in capsys.readouterr().out


def test_ranks_are_counted_as_the_batch_scripts_count_them(line, monkeypatch, capsys):
    submit.main([line.path, "--nodes", "2", "--dry-run"])
    assert "pretrain: 2 nodes of 8 ranks, 16 in all" in capsys.readouterr().out  # of its #SBATCH lines
    monkeypatch.setenv("RANKS_PER_NODE", "3")
    submit.main([line.path, "--nodes", "2", "--dry-run", "--gpus_per_node", "0"])
    said = capsys.readouterr().out
    assert "pretrain: 2 nodes of 3 ranks without GPU, 6 in all" in said and "--gpus-per-node=0 launchers/slurm/train_tokenizer.sbatch" in said
    monkeypatch.setenv("RANKS_PER_NODE", "two")
    assert "RANKS_PER_NODE=two: must be a whole number" in refused(capsys, line.path, "--nodes", "2", "--dry-run")
    monkeypatch.delenv("RANKS_PER_NODE")
    (line.folder / "own.json").write_text('{"train_batch_size": 12, "zero_optimization": {"stage": 1}}')
    path = line("pretrain", deepspeed=f"{line.folder}/own.json", per_device_train_batch_size=3)
    assert "train_batch_size" in refused(capsys, path, "--nodes", "1", "--dry-run")  # 12 rows over the script's 8 GPUs
    submit.main([path, "--nodes", "1", "--dry-run", "--gpus_per_node", "4", "--chain", "train_tokenizer,shard,pretrain"])


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("llama3.2-3b-pretrain", "pretrain"), ("llama3.2-3b-instruct", "instruct"), ("paper-pretrain", "pretrain"), ("paper-instruct", "instruct"),
        ("smollm2-pretrain", "pretrain"), ("tokenizer-heartspeed", "train_tokenizer"),
    ],
)  # fmt: skip
def test_the_launcher_of_a_shipped_recipe_without_sections_is_found(name, stage):
    assert submit.chain_of(f"recipes/{name}.yaml") == [stage]


def test_the_shipped_line_is_in_order_once_its_data_are_there(tmp_path, capsys):
    recipe = load("recipes/ptbxl-line.yaml")
    for name in ("ptb-xl", "qa", "manifest"):
        (tmp_path / name).mkdir()
    recipe["shard"]["root"], recipe["tasks"][0]["qa"], recipe["train_tokenizer"]["manifest"] = (str(tmp_path / name) for name in ("ptb-xl", "qa", "manifest"))
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe))
    submit.main([str(tmp_path / "mine.yaml"), "--nodes", "1", "--dry-run", "--gpus_per_node", "8", "--gpu", "rtx4090"])
    said = capsys.readouterr()
    assert not said.err and said.out.count("command sbatch") == 5


@pytest.mark.parametrize(
    ("stage", "values", "message"),
    [
        ("pretrain", {"seq_len": "long"}, "section pretrain: seq_len: must be int, not 'long'"),
        ("pretrain", {"sequence": 3}, "there is no argument 'sequence'"),
        ("instruct", {"lora_r": 0}, "section instruct: --lora_r must be at least 1, not 0"),
        ("instruct", {"output_dir": None}, "output_dir: must be str, not None"),
        ("shard", {"shard_size": "[x"}, "section shard: argument --shard_size: invalid int value: '[x'"),
        ("shard", {"root": "nowhere"}, "--root of shard: nowhere is not there and no earlier stage of the chain makes it"),
        ("pretrain", {"shards": "other"}, "--shards of pretrain: other is not there and no earlier stage of the chain makes it; shard writes {}/d/shards"),
        ("instruct", {"backbone": "{}/q"}, "--backbone of instruct: {}/q is not there and no earlier stage of the chain makes it; pretrain writes {}/p"),
        ("evaluate", {"model": "{}/m"}, "--model of evaluate: {}/m is not there and no earlier stage of the chain makes it; instruct writes {}/l"),
        ("instruct", {"output_dir": "{}/p"}, "pretrain and instruct both write {}/p"),
        ("pretrain", {"deepspeed": "ds_configs/zero4.json"}, "--deepspeed of pretrain: ds_configs/zero4.json is not there"),
        ("pretrain", {"deepspeed": "{}/own.json"}, "zero_optimization.stage must be one of (0, 1, 2, 3), not 7"),
    ],
)
def test_what_would_end_a_stage_hours_later_is_said_before_anything_is_queued(line, cluster, capsys, tmp_path, stage, values, message):
    (tmp_path / "own.json").write_text('{"zero_optimization": {"stage": 7}}')
    path = line(stage, **{name: value.format(tmp_path) if isinstance(value, str) else value for name, value in values.items()})
    assert message.replace("{}", str(tmp_path)) in refused(capsys, path, "--nodes", "1")
    assert not (tmp_path / "calls").exists()


def test_a_stage_that_reads_another_folder_than_the_one_before_writes_is_warned_of(line, tmp_path, capsys):
    (tmp_path / "old").mkdir()
    submit.main([line("instruct", backbone="tiny", shards=[f"{tmp_path}/old"]), "--nodes", "1", "--dry-run"])
    said = capsys.readouterr().err
    assert f"warning: instruct reads --shards {tmp_path}/old, not the task shards that shard writes: {tmp_path}/tasks" in said
    assert f"warning: instruct reads --backbone tiny, not the pretrained model that pretrain writes: {tmp_path}/p" in said


def test_memory_and_what_needs_a_network_are_warned_of(line, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = line("pretrain", backbone="meta-llama/Llama-3.2-3B", per_device_train_batch_size=8, precision="bf16")
    submit.main([path, "--nodes", "1", "--dry-run", "--gpus_per_node", "1", "--gpu", "rtx4090"])
    said = capsys.readouterr().err
    assert "--backbone meta-llama/Llama-3.2-3B is not in the Hugging Face cache" in said and "hf download meta-llama/Llama-3.2-3B" in said
    assert "GB a rank by plan, --gpu rtx4090 has 24" in said
    submit.main([line.path, "--nodes", "1", "--dry-run", "--gpus_per_node", "1", "--gpu", "rtx4090"])  # tiny fits


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--nodes", "0"], "--nodes: must be at least 1"),
        (["--nodes", "1", "--shard_jobs", "0"], "--shard_jobs: must be at least 1"),
        (["--nodes", "1", "--chain", "pretrain,shard"], "--chain: each stage once, in the order of the line: shard,pretrain"),
        (["--nodes", "1", "--chain", "pretrain,report"], "--chain: there is no stage 'report'"),
        (["--nodes", "1", "--chain", "train_tokenizer,evaluate"], "has no section evaluate"),
        (["--nodes", "1", "--", "--qos=long", "--array=3"], "-- --array=3: is set here for each stage"),
        (["--nodes", "1", "--", "-N4"], "-- -N4: is set here"),
    ],
)
def test_mistakes_of_the_command_line(line, capsys, argv, message):
    assert message in refused(capsys, line(without="evaluate"), "--dry-run", *argv)


def test_without_sbatch_or_elsewhere_it_says_where_to_run_it(line, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "sbatch is not on the PATH" in refused(capsys, line.path, "--nodes", "1")
    monkeypatch.chdir(tmp_path)
    assert f"run it in {ROOT}" in refused(capsys, line.path, "--nodes", "1", "--dry-run")


def test_a_recipe_that_several_launchers_take_needs_the_stage(tmp_path, capsys):
    (tmp_path / "r.yaml").write_text("output_dir: o\ndeepspeed: ds_configs/zero1.json\nshards: s\nseq_len: 3\nseqlen: 3\nbackbone: tiny\n")
    assert "there is no argument 'seqlen'; did you mean 'seq_len'?" in refused(capsys, str(tmp_path / "r.yaml"), "--nodes", "1", "--dry-run")
    (tmp_path / "r.yaml").write_text("pretrian:\n  output_dir: o\n")
    assert "there is no section 'pretrian'; there are train_tokenizer" in refused(capsys, str(tmp_path / "r.yaml"), "--nodes", "1", "--dry-run")
    (tmp_path / "r.yaml").write_text("output_dir: o\ndeepspeed: ds_configs/zero1.json\nmanifest: m\nseq_len: 3\n")
    assert "no launcher takes all of it: add --chain" in refused(capsys, str(tmp_path / "r.yaml"), "--nodes", "1", "--dry-run")
