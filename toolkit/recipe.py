"""Recipes: YAML files of `argument: value` lines, for one launcher; or of sections, one a stage of the line, as in recipes/ptbxl-line.yaml.

    python -m toolkit.recipe pretrain recipes/ptbxl-line.yaml                             # prints the run's folder
    python -m toolkit.recipe pretrain recipes/ptbxl-line.yaml --output_dir runs/other     # arguments override the recipe, as in a launcher

The second form is what the batch scripts of launchers/slurm/ ask. Imports no torch: it answers in a fraction of a second.
"""

import argparse
import sys
from pathlib import Path

import yaml

from toolkit.errors import UserError, exit_2_on_user_error

STAGES = ("train_tokenizer", "shard", "pretrain", "instruct", "evaluate")  # in the order of the line
TASKS = "tasks"  # the section that sharding.line does after `shard`: a list of arguments of sharding.shard_tasks


def load(path: str | Path) -> dict:
    """The recipe as it is written. Raises UserError if it cannot be read, is no YAML, or holds neither arguments nor sections."""
    try:
        recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--recipe: {path} cannot be read ({error.strerror}); the shipped ones are in recipes/") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--recipe: {path} is no valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(recipe, dict):
        raise UserError(f"--recipe: {path} must hold lines of `argument: value`, or sections of them")
    for name, section in recipe.items() if has_sections(recipe) else ():
        if name not in (*STAGES, TASKS):
            raise UserError(f"--recipe: {path}: there is no section {name!r}; there are {', '.join((*STAGES, TASKS))}")
        rows = section if name == TASKS else [section]
        if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
            wanted = "a list (`- kind: ecgqa` ...) of `argument: value` lines" if name == TASKS else "lines of `argument: value`"
            raise UserError(f"--recipe: {path}: section {name} must hold {wanted}")
    return recipe


def has_sections(recipe: dict) -> bool:
    """Whether a recipe is of sections: no launcher has an argument named as a stage, or one that holds an output folder. (`tasks` of instruct.py is a text.)"""
    named = any(name in STAGES or (isinstance(value, dict) and {"output_dir", "out"} & value.keys()) for name, value in recipe.items())
    return named or isinstance(recipe.get(TASKS), list)


def read(path: str | Path, stage: str | None) -> dict:
    """The arguments for `stage`: those of its section, or all of a recipe without sections, which is for whatever launcher reads it.

    Raises UserError naming the file if it has sections and none of this name.
    """
    recipe = load(path)
    if not has_sections(recipe):
        return recipe
    if stage not in recipe:
        raise UserError(f"--recipe: {path} has no section {stage}; it has {', '.join(recipe)}")
    return recipe[stage]


def where(path: str | Path, stage: str | None) -> str:
    """How the message of a mistake in the arguments for `stage` begins."""
    return f"--recipe: {path}, section {stage}" if has_sections(load(path)) else f"--recipe: {path}"


def output_dir(stage: str, path: str, argv: list[str]) -> str:
    """The folder that a stage writes: of the arguments, else of the recipe. For `shard` it is `out`. Raises UserError if neither says it, or the
    arguments name a second recipe."""
    name = "out" if stage == "shard" else "output_dir"
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}")  # as launchers take it
    parser.add_argument("--recipe")
    args = vars(parser.parse_known_args(argv)[0])
    if args["recipe"]:
        raise UserError(f"--recipe {args['recipe']}: {path} is the recipe already; a job takes one")
    folder = args[name] or read(path, stage).get(name)
    if folder in (None, ""):
        raise UserError(f"--{name}: neither the arguments nor {path} say it; put --{name} FOLDER behind the recipe")
    return str(folder)


@exit_2_on_user_error
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m toolkit.recipe", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES, help="the launcher, or shard")
    parser.add_argument("recipe", help="YAML file of arguments")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="further arguments of the launcher")
    args = parser.parse_args(argv)
    print(output_dir(args.stage, args.recipe, args.arguments))


if __name__ == "__main__":
    main(sys.argv[1:])
