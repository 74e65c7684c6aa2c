"""What launchers/submit.py looks at before anything is queued: each stage's arguments by its own parser, and that what it reads will be there."""

import contextlib
import dataclasses
import io
import os
import re
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from sharding import line, prepare
from toolkit import plan
from toolkit.errors import UserError
from toolkit.recipe import STAGES, TASKS, has_sections, load, where
from toolkit.shards.remote import is_url
from toolkit.training import ds_config
from toolkit.training.arguments import parse

ARGUMENTS = {"train_tokenizer": "TokenizerArguments", "pretrain": "PretrainArguments", "instruct": "InstructArguments", "evaluate": "EvaluateArguments"}
READS = {  # argument -> what it is, where a stage of the line makes such; None: a file of the user's
    "train_tokenizer": {"manifest": None, "deepspeed": None},
    "pretrain": {"shards": "token shards", "backbone": None, "deepspeed": None},
    "instruct": {"shards": "task shards", "backbone": "pretrained model", "deepspeed": None, "text": None},
    "evaluate": {"shards": "task shards", "model": "adapter", "train_shards": None, "classes": None},
}
WRITES = {"train_tokenizer": "ECG tokenizer", "pretrain": "pretrained model", "instruct": "adapter", "evaluate": "evaluation"}
NAMED = ("tiny", "smollm2")  # backbones that are no folder
SCRIPTS = Path(__file__).parent / "slurm"


@dataclass(frozen=True)
class Stage:
    """reads: (argument, path, what it is or None) each; writes: what it is -> folders."""

    name: str
    args: object
    reads: list[tuple[str, str, str | None]]
    writes: dict[str, list[str]]


def chain_of(recipe: str) -> list[str]:
    """The sections of a recipe in the order of the line; of a recipe without sections the one launcher that takes all of it."""
    content = load(recipe)
    if has_sections(content):
        if TASKS in content and "shard" not in content:
            raise UserError(f"--recipe: {recipe}: section {TASKS} is done by stage shard, which has no section")
        return [stage for stage in STAGES if stage in content]
    takes = []
    for stage in ARGUMENTS:
        with contextlib.suppress(UserError):
            takes.append(understand(recipe, stage).name)
    if not takes:  # a mistake in the recipe of one launcher is said as such
        known = {stage: len(content.keys() & {field.name for field in dataclasses.fields(_arguments(stage))}) for stage in ARGUMENTS}
        best = [stage for stage in known if known[stage] == max(known.values())]
        if len(best) == 1:
            understand(recipe, best[0])
    if len(takes) != 1:
        which = f"{' and '.join(takes)} take it as it stands" if takes else "no launcher takes all of it"
        raise UserError(f"--chain: {recipe} has no sections, and {which}: add --chain and the stage it is for, such as --chain pretrain")
    return takes


def _arguments(stage: str) -> type:
    return getattr(import_module(f"launchers.{stage}"), ARGUMENTS[stage])


def understand(recipe: str, stage: str) -> Stage:
    """A stage by its own parser, as its batch script starts it. Raises UserError naming the recipe and what its parser says."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            if stage == "shard":
                return _shard(recipe)
            args = parse(_arguments(stage), "", ["--recipe", recipe])
    except SystemExit:
        raise UserError(f"{where(recipe, stage)}: {said.getvalue().strip().splitlines()[-1].split('error: ')[-1]}") from None
    except UserError as error:
        raise error if str(error).startswith("--recipe") else UserError(f"{where(recipe, stage)}: {error}") from None
    values = {name: getattr(args, name) for name in READS[stage]}
    reads = [(name, str(one), READS[stage][name]) for name, value in values.items() for one in (value if isinstance(value, list) else [value]) if one]
    return Stage(stage, args, reads, {WRITES[stage]: [args.output_dir]})


def _shard(recipe: str) -> Stage:
    args = line.shard_arguments(recipe)
    tasks = [line.shard_tasks.parser().parse_args(words) for words in line.task_arguments(recipe, args.out / "shards")]
    kinds = {"tokenizer": "ECG tokenizer"}
    reads = [(name, str(value), kinds.get(name)) for name, value in vars(args).items() if isinstance(value, Path) and name != "out"]
    reads += [("qa", str(path), None) for task in tasks for path in task.qa or []]
    writes = {"token shards": [str(args.out / "shards")], "manifest": [str(args.out / "manifest")], "task shards": [str(task.out) for task in tasks]}
    return Stage("shard", args, reads, writes)


def size_of(stage: str, nodes: int, gpus_per_node: int | None) -> tuple[int, int, bool]:
    """(nodes, ranks a node, whether each has a GPU) of a stage's job. The tokenizer is small: one node, as its batch script says.

    nodes, gpus_per_node: of submit.py's command line; None: as the batch script says. Raises UserError if RANKS_PER_NODE is no number.
    """
    script = (SCRIPTS / f"{stage}.sbatch").read_text()
    own = int(re.search(r"^#SBATCH --gpus-per-node=(\d+)", script, re.MULTILINE)[1])
    gpus = own if gpus_per_node is None or (stage == "train_tokenizer" and gpus_per_node) else gpus_per_node
    ranks = os.environ.get("RANKS_PER_NODE") or str(gpus or 1)
    if not ranks.isdecimal() or int(ranks) < 1:
        raise UserError(f"RANKS_PER_NODE={ranks}: must be a whole number from 1 on")
    return 1 if stage == "train_tokenizer" else nodes, int(ranks), gpus > 0


def check(stages: list[Stage], nodes: int, gpus_per_node: int | None, gpu: str | None) -> list[str]:
    """Warnings about a chain. Raises UserError for what would end a stage hours later: files that are not there and no stage makes, a ds_config
    that is refused, two stages that write one folder."""
    made, kinds, warnings = {}, {}, []  # folder -> the stage that writes it; what it is -> (folders, stage)
    for stage in stages:
        for kind in {kind for _, _, kind in stage.reads} & kinds.keys():
            folders, maker = kinds[kind]
            read = [(flag, path) for flag, path, what in stage.reads if what == kind]
            if not {_real(path) for _, path in read} & {_real(folder) for folder in folders}:
                warnings.append(f"{stage.name} reads --{read[0][0]} {read[0][1]}, not the {kind} that {maker} writes: {' '.join(folders)}")
        for flag, path, kind in stage.reads:
            warnings += _there(stage.name, flag, path, made, kinds.get(kind))
        for kind, folders in stage.writes.items():
            for folder in set(folders):
                if _real(folder) in made:
                    raise UserError(f"--recipe: {made[_real(folder)]} and {stage.name} both write {folder}; give each stage its own folder")
                made[_real(folder)] = stage.name
            if folders:
                kinds[kind] = (folders, stage.name)
        if stage.name == "shard":
            prepare.check_arguments(stage.args)
        elif stage.name != "evaluate":
            count, ranks, with_gpus = size_of(stage.name, nodes, gpus_per_node)
            bf16 = stage.args.precision == "bf16" or (stage.args.precision == "auto" and with_gpus)
            world = count * ranks
            ds_config.resolve(stage.args.deepspeed, stage.args, world, bf16, hidden_size=1024)  # of any model: for the "auto"s
            if stage.name == "pretrain" and gpu:
                warnings += _memory(stage.args, world, gpu)
    return warnings


def _there(stage: str, flag: str, path: str, made: dict, maker: tuple | None) -> list[str]:
    """Warnings about one path that a stage reads; raises UserError if it is not there and no earlier stage makes it."""
    if is_url(path) or _real(path) in made or Path(path).exists():
        return []
    if flag == "backbone":
        if path in NAMED:
            return []
        first = path.split("/")[0]
        if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path) and first not in ("runs", ".", "..") and not Path(first).is_dir():
            cached = isinstance(try_to_load_from_cache(path, "config.json"), str)
            return [] if cached else [f"{stage}: --backbone {path} is not in the Hugging Face cache; where nodes have no network: hf download {path}"]
    other = f"; {maker[1]} writes {' '.join(maker[0])}" if maker else "; make it first, or mend the path"
    raise UserError(f"--{flag} of {stage}: {path} is not there and no earlier stage of the chain makes it{other}")


def _memory(args, world: int, gpu: str) -> list[str]:
    """A warning if toolkit.plan says that pretraining does not fit the GPU; it says nothing of a backbone that is not to be had here."""
    own = {name: value for name, value in vars(args).items() if name not in ("shards", "local_rank")}
    try:
        planned = plan.make_plan(plan.PlanArguments(**own, world=world, gpu=gpu))
    except UserError as error:
        return [f"pretrain: memory was not planned ({error})"]
    state = next(state for state in planned["presets"].values() if state["chosen"])
    needed = state["peak"][args.gradient_checkpointing]
    if needed <= planned["gpu_memory"]:
        return []
    return [f"pretrain needs {needed / 1e9:.0f} GB a rank by plan, --gpu {gpu} has {planned['gpu_memory'] / 1e9:.0f}: see python -m toolkit.plan --scaling"]


def _real(path: str) -> str:
    return os.path.realpath(path)
