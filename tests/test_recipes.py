"""`--recipe`: every shipped recipe parses with the launcher of its own command; what is wrong in one is said with the file and the key."""

import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Literal

import pytest
import yaml

from sharding import line
from toolkit.errors import UserError
from toolkit.recipe import STAGES, has_sections, load, read
from toolkit.training.arguments import LaunchArguments, arg, parse

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted(ROOT.glob("recipes/**/*.yaml"))
FLAT = [path for path in RECIPES if not has_sections(load(path))]
LINES = [path for path in RECIPES if path not in FLAT]
CLASSES = {"pretrain": "PretrainArguments", "instruct": "InstructArguments", "train_tokenizer": "TokenizerArguments", "evaluate": "EvaluateArguments"}
PATHS = {"shards", "manifest", "output_dir"}


def test_there_are_recipes():
    assert {path.stem for path in RECIPES} >= {
        "llama3.2-3b-pretrain", "llama3.2-3b-instruct", "paper-pretrain", "smollm2-pretrain", "tokenizer-heartspeed", "ptbxl-line"
    }  # fmt: skip


@pytest.mark.parametrize("path", FLAT, ids=lambda path: path.stem)
def test_every_shipped_recipe_parses_with_the_command_in_its_comments(path):
    """The launcher is the one that the command names."""
    name = path.relative_to(ROOT)
    launcher, given = re.search(rf"launchers/(\w+)\.py (--recipe {name}.*)", path.read_text()).groups()
    cls = getattr(import_module(f"launchers.{launcher}"), CLASSES[launcher])
    args = parse(cls, "", shlex.split(given.replace(str(name), str(path))))
    recipe = yaml.safe_load(path.read_text())
    # an ablation's folders are the benchmark's; the others run as they stand, so that a command of two words can submit them
    paths = {name: value[0] if isinstance(value, list) else value for name, value in recipe.items() if name in PATHS}
    assert len(paths) == (0 if path.parent.name == "ablations" else 2) and all(value.startswith("runs/") for value in paths.values())
    assert (ROOT / args.deepspeed).is_file()
    for name, value in recipe.items():
        assert getattr(args, name) == (float(value) if name == "learning_rate" else value)


@pytest.mark.parametrize("path", LINES, ids=lambda path: path.stem)
def test_a_line_parses_with_the_commands_in_its_comments_and_its_stages_fit(path):
    """What a stage reads is what an earlier one writes, or the user's; submit.py's own checks are in tests/launchers/test_submit.py."""
    name, recipe = path.relative_to(ROOT), load(path)
    commands = re.findall(rf"launchers/(\w+)\.py (--recipe {name}.*)", path.read_text())
    assert [launcher for launcher, _ in commands] == [stage for stage in STAGES if stage in recipe and stage != "shard"]
    for launcher, given in commands:
        args = parse(getattr(import_module(f"launchers.{launcher}"), CLASSES[launcher]), "", shlex.split(given.replace(str(name), str(path))))
        assert {key: getattr(args, key) for key in recipe[launcher]} == recipe[launcher]
    shard = line.shard_arguments(path)
    tasks = line.task_arguments(path, shard.out / "shards")
    assert recipe["pretrain"]["shards"] == str(shard.out / "shards") and recipe["train_tokenizer"]["manifest"] == str(shard.out / "manifest")
    assert all(f"--out={recipe['evaluate']['shards']}" in command for command in tasks)


def test_the_section_of_a_launcher_is_read_and_no_other(tmp_path):
    path = tmp_path / "line.yaml"
    path.write_text("pretrain:\n  output_dir: p\n  backbone: tiny\nevaluate:\n  output_dir: e\n")
    assert read(path, "pretrain") == {"output_dir": "p", "backbone": "tiny"} and read(path, "evaluate") == {"output_dir": "e"}
    with pytest.raises(UserError, match=r"--recipe: .*line.yaml has no section instruct; it has pretrain, evaluate"):
        read(path, "instruct")
    path.write_text("pretrain:\n  output_dir: p\nname: 3\n")
    with pytest.raises(UserError, match=r"--recipe: .*line.yaml: there is no section 'name'; there are train_tokenizer, shard"):
        read(path, "pretrain")
    for text, wanted in (("pretrain: p\n", "section pretrain must hold lines"), ("tasks: [a]\n", "section tasks must hold a list")):
        path.write_text(text)
        with pytest.raises(UserError, match=wanted):
            read(path, "pretrain")


def test_toolkit_recipe_prints_the_runs_folder_without_torch(tmp_path):
    """As the batch scripts ask it."""
    line, flat = tmp_path / "line.yaml", tmp_path / "flat.yaml"
    line.write_text("shard:\n  out: d\npretrain:\n  output_dir: p\n")
    flat.write_text("tasks: all\n")

    def asked(*words):
        return subprocess.run([sys.executable, "-X", "importtime", "-m", "toolkit.recipe", *map(str, words)], cwd=ROOT, capture_output=True, text=True)

    said = asked("pretrain", line)
    assert (said.returncode, said.stdout) == (0, "p\n") and not re.search(r"\| +(torch|transformers|numpy)$", said.stderr, re.M)
    assert asked("shard", line).stdout == "d\n"
    assert asked("pretrain", line, "--max_steps", "3", "--output_dir", "q", "--hang_timeout=5").stdout == "q\n"
    assert asked("instruct", flat, "--output_dir=r").stdout == "r\n"
    assert asked("pretrain", line, "--output-dir", "s").stdout == "s\n" and asked("pretrain", line, "--output-dir=t").stdout == "t\n"  # launchers take both
    said = asked("pretrain", line, "--recipe", flat)
    assert said.returncode == 2 and f"error: --recipe {flat}: {line} is the recipe already" in said.stderr
    said = asked("instruct", flat, "--max_steps", "3")
    assert said.returncode == 2 and said.stderr.splitlines()[-1].startswith(f"error: --output_dir: neither the arguments nor {flat} say it")


def test_the_papers_recipes_are_the_releases_choice():
    recipe, tuning = (yaml.safe_load((ROOT / f"recipes/paper-{stage}.yaml").read_text()) for stage in ("pretrain", "instruct"))
    assert (tuning["prompt"], tuning["train_rows"], tuning["train_norms"], tuning["lora_r"], tuning["lora_alpha"]) == ("paper", "none", True, 64, 16)
    assert (recipe["objective"], recipe["train"], float(recipe["learning_rate"]), recipe["num_train_epochs"]) == ("windows", "lora+norms+embeddings", 1e-4, 1)


@dataclass(kw_only=True)
class Arguments(LaunchArguments):
    rate: float = arg("A number.")
    steps: int = arg("A whole number.", 3)
    mode: Literal["auto", "yes", "no"] = arg("A choice.", "auto")
    name: str | None = arg("A text.", None)
    flag: bool = arg("A switch.", False)
    drawn: bool = arg("A switch that is on.", True)
    levels: list[int] = arg("A list.", [6, 6])


def parsed(tmp_path, text: str, *argv: str) -> Arguments:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    return parse(Arguments, "What it does.", ["--recipe", str(path), *argv])


def test_a_recipe_gives_arguments_and_the_command_line_overrides_them(tmp_path):
    text = 'output_dir: out\nrate: 1e-4\nsteps: 7\nmode: "no"\nname: 12\nflag: true\ndrawn: false\nlevels: [8, 5]\n'
    args = parsed(tmp_path, text)
    assert args == Arguments(output_dir="out", rate=1e-4, steps=7, mode="no", name="12", flag=True, drawn=False, levels=[8, 5])
    args = parsed(tmp_path, text, "--steps=9", "--levels", "3", "4", "5", "--flag", "false", "--rate", "2", "--mode", "yes")
    assert (args.steps, args.levels, args.flag, args.rate, args.mode, args.name) == (9, [3, 4, 5], False, 2.0, "yes", "12")
    assert parse(Arguments, "", ["--output_dir", "o", "--rate", "1"]) == Arguments(output_dir="o", rate=1.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("step: 3", "there is no argument 'step'; did you mean 'steps'?"),
        ("3: 3", "there is no argument 3; --help lists them"),
        ("recipe: other.yaml", "there is no argument 'recipe'"),
        ("steps: 1.5", "steps: must be int, not 1.5"),
        ("steps: true", "steps: must be int, not True; put it in quotes"),
        ("steps:", "steps: must be int, not None; leave it out for the default"),
        ("steps: [1]", "steps: must be one value, not [1]"),
        ("rate: fast", "rate: must be float, not 'fast'"),
        ("mode: yes", "mode: must be one of auto, yes, no, not True; put it in quotes"),
        ("mode: never", "mode: must be one of auto, yes, no, not 'never'"),
        ("flag: 3", "flag: must be true or false, not 3"),
        ("name: {a: 1}", "name: must be str, not {'a': 1}"),
        ("levels: 6", "levels: must be a list, not 6"),
        ("levels: [6, x]", "levels: must be int, not 'x'"),
        ("- steps", "must hold lines of `argument: value`"),
        ("", "must hold lines of `argument: value`"),
        ("a: [", "is no valid YAML"),
    ],
)
def test_a_mistake_in_a_recipe_names_the_file_and_the_key(tmp_path, text, message):
    with pytest.raises(UserError) as caught:
        parsed(tmp_path, text)
    assert str(caught.value).startswith(f"--recipe: {tmp_path / 'r.yaml'}") and message in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="--recipe: .*none.yaml cannot be read .*recipes/"):
        parse(Arguments, "", ["--recipe", str(tmp_path / "none.yaml")])


@pytest.mark.parametrize(
    ("argv", "message"), [(["--recipe"], "--recipe: expected one argument"), (["--rate", "1"], "required: --output_dir"), (["--recip", "x"], "--recip")]
)
def test_the_usual_mistakes_exit_with_2(capsys, argv, message):
    with pytest.raises(SystemExit) as caught:
        parse(Arguments, "", argv)
    assert caught.value.code == 2 and message in capsys.readouterr().err


def test_a_value_that_the_dataclass_refuses_is_refused_from_a_recipe_too(tmp_path):
    with pytest.raises(UserError, match="--seed must be at least 0"):
        parsed(tmp_path, "output_dir: o\nrate: 1\nseed: -1\n")


def test_help_shows_the_argument_and_the_recipes_values(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        parsed(tmp_path, "steps: 77", "--help")
    said = capsys.readouterr().out
    assert caught.value.code == 0 and "--recipe FILE" in said and "default: 77" in said
