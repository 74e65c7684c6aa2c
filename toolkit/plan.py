"""Before anything is submitted: steps, tokens, memory for each ZeRO preset, time and GPU-hours of a pretraining run.

python -m toolkit.plan --recipe recipes/llama3.2-3b-pretrain.yaml --world 16
python -m toolkit.plan --recipe recipes/llama3.2-3b-pretrain.yaml --scaling             # communication and efficiency on 1 to 512 GPUs (docs/scaling.md)
python -m toolkit.plan --backbone tiny --deepspeed ds_configs/zero2.json --shards runs/demo/shards --world 2

Takes all arguments of launchers/pretrain.py, which overrides the recipe's. Nothing is loaded: the backbone is its shape. No GPU is needed.
"""

import dataclasses
import json
import math
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed says on stdout, amid the JSON, that it found no GPU

import numpy as np
import torch

from launchers.pretrain import PretrainArguments  # the plan takes what the launcher takes
from toolkit import scaling
from toolkit.errors import UserError, exit_2_on_user_error
from toolkit.lm.flops import GPUS, row_flops
from toolkit.lm.shapes import shape_of
from toolkit.lm.trainable import choose_trainable
from toolkit.shards.packing import Packed, pack
from toolkit.shards.reader import locate
from toolkit.shards.remote import is_url
from toolkit.tasks.data import ecgs_per_row
from toolkit.tasks.prompts import ecg_ids, forecast_group
from toolkit.tasks.windows import window_groups, window_starts
from toolkit.tokenizer.tokenizer import ECGTokenizer
from toolkit.training import ds_config
from toolkit.training.arguments import arg, parse
from toolkit.training.memory_plan import activation_bytes, layer_bytes, loss_bytes, peak_bytes, state_bytes

MIMIC = 800_035  # records of MIMIC-IV-ECG 1.0
CODES = 6**4  # without --shards: the tokenizer's default
PRESETS = Path(__file__).resolve().parents[1] / "ds_configs"
NAMES = ("zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")


@dataclass(kw_only=True)
class PlanArguments(PretrainArguments):
    shards: str | None = arg("Token shards, for the number of ECGs and of codes.", None)
    output_dir: str = arg("Not written.", "")
    deepspeed: str = arg("The preset that is marked, among all that are shown.", str(PRESETS / "zero2.json"))
    ecgs: int | None = arg(f"ECGs to train on. Default: those of the shards' train split, else {MIMIC:,} (MIMIC-IV-ECG).", None)
    world: int = arg("GPUs (ranks).", 1)
    gpu: Literal[tuple(GPUS)] = arg("Which, for its memory and its peak FLOPS.", "h100")
    mfu: float = arg("Share of the peak that the run is assumed to reach.", 0.4)
    scaling: bool = arg("Print what 1, 2, 4, ..., 512 GPUs cost instead: memory, bytes sent, efficiency of each preset. --world has no effect.", False)
    gpus_per_node: int = arg("With --scaling: GPUs of a node.", 8)
    intra_gbs: float = arg("With --scaling: GB/s from a GPU to those of its node, in one direction. Default: NVLink of an H100, by its data sheet.", 450.0)
    inter_gbs: float = arg("With --scaling: GB/s from a node to others, all its network cards together. Default: eight of 400 Gb/s.", 400.0)
    json: bool = arg("Print JSON.", False)

    def __post_init__(self):
        super().__post_init__()
        if self.world < 1 or (self.ecgs is not None and self.ecgs < 1):
            raise UserError("--world and --ecgs must be at least 1")
        if self.gpus_per_node < 1 or not (self.intra_gbs > 0 and self.inter_gbs > 0):
            raise UserError("--gpus_per_node must be at least 1, --intra_gbs and --inter_gbs above 0")
        if not 0 < self.mfu <= 1:
            raise UserError(f"--mfu must be a share above 0 and at most 1, not {self.mfu}")
        if self.precision == "bf16" and not GPUS[self.gpu].bf16:
            raise UserError(f"--precision bf16: --gpu {self.gpu} has no bf16; use fp32")


def make_plan(args: PlanArguments) -> dict:
    """All figures, bytes and seconds. Raises UserError naming the argument."""
    m, ecgs = measures(args), ecgs_of(args)[0]
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world
    steps = args.max_steps if args.max_steps >= 0 else math.ceil(args.num_train_epochs * ecgs / (rows * m.per_row))
    step_flops = m.row_flops * rows
    step_seconds = step_flops / (m.peak * args.world * args.mfu)
    # weights in float32 and Adam's moments; ZeRO stage 0 in bf16 keeps the bf16 weights beside them (training/checkpoint.py)
    per_weight = 14 if m.bf16 and ds_config.read(args.deepspeed)["zero_optimization"]["stage"] == 0 else 12
    return {
        "backbone": args.backbone, "objective": args.objective, "train": args.train, "precision": "bf16" if m.bf16 else "fp32",
        "world": args.world, "gpu": args.gpu, "gpu_memory": GPUS[args.gpu].memory * 10**9, "peak_flops": m.peak, "mfu": args.mfu,
        "reports_not_counted": args.report_targets == "yes"
        or (args.report_targets == "auto" and args.backbone == "tiny" and args.head == "full"),
        "gradient_checkpointing": args.gradient_checkpointing, "ecgs": ecgs, "epochs": steps * rows * m.per_row / ecgs, "seq_len": args.seq_len,
        "parameters": m.total, "trained": m.trained, "vocabulary": m.vocabulary,
        "tokens_per_ecg": len(m.ecg.input_ids), "targets_per_ecg": len(m.ecg.targets), "ecgs_per_row": m.per_row,
        "rows_per_step": rows, "ecgs_per_step": rows * m.per_row, "tokens_per_step": rows * m.per_row * len(m.ecg.input_ids),
        "steps": steps, "ecgs_in_all": steps * rows * m.per_row, "tokens_in_all": steps * rows * m.per_row * len(m.ecg.input_ids),
        "step_flops": step_flops, "step_seconds": step_seconds, "seconds": steps * step_seconds, "gpu_hours": steps * step_seconds * args.world / 3600,
        "checkpoint": per_weight * m.trained, "export": m.size * m.total,
        "activations": m.activations, "loss": m.loss, "presets": {name: preset(args, path, m, args.world) for name, path in presets(args)},
    }  # fmt: skip


def make_scaling(args: PlanArguments) -> dict:
    """What each preset costs on 1 to 512 GPUs, each with the batch of the arguments: bytes, seconds. Raises UserError naming the argument."""
    m, links = measures(args), scaling.Links(args.gpus_per_node, args.intra_gbs, args.inter_gbs)
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
    compute = m.row_flops * rows / (m.peak * args.mfu)
    if (fixed := ds_config.read(args.deepspeed).get("train_batch_size", "auto")) != "auto":
        raise UserError(
            f"--deepspeed: {args.deepspeed}: train_batch_size is {fixed} on any number of GPUs, while --scaling keeps the batch of each GPU; write \"auto\""
        )

    def at(name: str, path: Path, world: int) -> dict:
        zero, state = resolved(args, path, m, world), preset(args, path, m, world)
        buffers = scaling.volumes(zero, m.uses, m.trained, args.gradient_accumulation_steps, m.size)
        sent, hidden = (scaling.cost(moved, world, links) for moved in (buffers, scaling.hideable(zero, buffers)))
        in_turn, at_best = scaling.efficiency(compute, sent.seconds, hidden.seconds)
        memory = {part: state[part] for part in ("weights", "gradients", "optimizer", "buffers", "host")}
        memory["gradients"] += state["transient"]
        memory |= {"activations": m.activations[args.gradient_checkpointing] + m.loss, "peak": state["peak"][args.gradient_checkpointing]}
        return {"world": world, "rows": rows * world, "ecgs": rows * world * m.per_row, "memory": memory, "collectives": buffers,
                **dataclasses.asdict(sent), "efficiency_in_turn": in_turn, "efficiency_at_best": at_best}  # fmt: skip

    found = {}
    for name, path in presets(args):
        first = preset(args, path, m, 1)
        if "refused" in first:
            found[name] = first
            continue
        worlds = [at(name, path, world) for world in scaling.WORLDS]
        offload = bool(resolved(args, path, m, 1).get("offload_optimizer"))
        found[name] = {"chosen": first["chosen"], "offload": offload, "collectives": worlds[0].pop("collectives"), "worlds": worlds}
    return {
        "backbone": args.backbone, "train": args.train, "precision": "bf16" if m.bf16 else "fp32", "gpu": args.gpu, "gpu_memory": GPUS[args.gpu].memory * 10**9,
        "peak_flops": m.peak, "mfu": args.mfu, "gradient_checkpointing": args.gradient_checkpointing, "links": dataclasses.asdict(links), "rows": rows,
        "ecgs_per_row": m.per_row, "tokens_per_row": m.per_row * len(m.ecg.input_ids), "compute_seconds": compute, "presets": found,
    }  # fmt: skip


def ecgs_of(args: PlanArguments) -> tuple[int, int]:
    """Numbers of ECGs to train on and of codes."""
    index = locate(args.shards, "--shards", cache=args.shard_cache, cache_gb=args.shard_cache_gb)[2] if args.shards else {}
    splits = index.get("splits", {"train": {"samples": MIMIC}})
    if "train" not in splits:
        raise UserError(f"--shards: {args.shards} has no split train")
    return args.ecgs or splits["train"]["samples"], index.get("codes", CODES)


def measures(args: PlanArguments) -> SimpleNamespace:
    """What does not depend on the number of GPUs: counts of parameters and tokens, FLOPs of a row, bytes of activations and of the loss."""
    gpu, bf16 = GPUS[args.gpu], args.precision != "fp32" and GPUS[args.gpu].bf16 is not None
    base, tokenizer, vocabulary = shape_of(args.backbone, ecgs_of(args)[1], args.gain_tokens)
    config, hidden_size = base.config.get_text_config(), base.config.get_text_config().hidden_size
    with torch.device("meta"):
        lm = choose_trainable(base, vocabulary, args.train)
    head_rows = len(vocabulary.code_rows) if args.head == "ecg" else None
    trained = [p.numel() for p in lm.parameters() if p.requires_grad]
    one = ecg_row(args.objective, tokenizer, vocabulary)
    per_row = ecgs_per_row(len(one.input_ids), args.seq_len)
    flops = row_flops(lm, head_rows)(one) * per_row
    total, uses = sum(p.numel() for p in lm.parameters()), scaling.order_of_use(lm, base)

    lm.to(torch.bfloat16 if bf16 else torch.float32)
    size, tokens = 2 if bf16 else 4, args.per_device_train_batch_size * per_row * len(one.input_ids)
    layer = layer_bytes(base, tokens)
    modes = list(dict.fromkeys(["none", "every_2", "full", args.gradient_checkpointing]))
    activations = {how: activation_bytes(layer, config.num_hidden_layers, tokens * hidden_size * size, how) for how in modes}
    head = base.get_output_embeddings().weight
    return SimpleNamespace(
        bf16=bf16, size=size, peak=1e12 * (gpu.bf16 if bf16 else gpu.fp32), hidden_size=hidden_size, total=total, trained=sum(trained),
        largest=max(trained), uses=uses, vocabulary=len(head), ecg=one, per_row=per_row, row_flops=flops, activations=activations,
        loss=loss_bytes(head_rows or len(head), hidden_size, head.requires_grad, bf16),
    )  # fmt: skip


def ecg_row(objective: str, tokenizer, vocabulary) -> Packed:
    """The sequences of one ECG of 10 s, as toolkit/tasks/data.py makes them."""
    codes, gains = np.zeros((1, ECGTokenizer.tokens_per_ecg), np.uint16), np.ones((1, 12))
    if objective == "causal":
        return pack([forecast_group(tokenizer, vocabulary, codes, gains)])
    ids = ecg_ids(tokenizer, vocabulary, codes, gains)
    opening, tokens, _ = np.split(ids, [-1 - codes.size, -1])
    return pack(window_groups(opening, tokens, window_starts(codes.size, 0, 0, 0)))


def presets(args: PlanArguments) -> list[tuple[str, Path]]:
    """Name and file of each ZeRO preset, and of --deepspeed if it is another file."""
    shipped = {name: PRESETS / f"{name}.json" for name in NAMES}
    chosen = Path(args.deepspeed)
    own = {} if chosen.resolve() in shipped.values() else {str(chosen): chosen}
    return list({**shipped, **own}.items())


def resolved(args: PlanArguments, path: Path, m: SimpleNamespace, world: int) -> dict:
    """The section `zero_optimization` as the run would have it."""
    return ds_config.resolve(str(path), args, world, m.bf16, m.hidden_size)["zero_optimization"]


def preset(args: PlanArguments, path: Path, m: SimpleNamespace, world: int) -> dict:
    """Bytes per rank, `peak` by gradient checkpointing; or why a run would refuse this configuration."""
    chosen = path.resolve() == Path(args.deepspeed).resolve()
    try:
        zero = resolved(args, path, m, world)
    except UserError as error:
        if chosen:
            raise
        return {"chosen": False, "refused": str(error).rsplit(": ", 1)[-1]}
    state = state_bytes(zero, m.total, m.trained, world, m.bf16, m.largest, args.gradient_accumulation_steps > 1)
    return {"chosen": chosen, **dataclasses.asdict(state), "peak": {how: peak_bytes(state, a, m.loss) for how, a in m.activations.items()}}


def text(plan: dict) -> str:
    """The plan as it is printed; GB are 10^9 bytes."""
    gb = lambda number: f"{number / 1e9:,.1f}"
    lines = [
        f"{plan['backbone']}: {plan['objective']}, train {plan['train']}, {plan['precision']}, {plan['world']} x {plan['gpu']} of {gb(plan['gpu_memory'])} GB",
        f"parameters     {plan['parameters']:,}, trained {plan['trained']:,}; vocabulary {plan['vocabulary']:,}",
        f"one step       {plan['ecgs_per_step']:,} ECGs, {plan['tokens_per_step']:,} tokens: {plan['rows_per_step']} rows of {plan['ecgs_per_row']} ECGs"
        f" ({plan['ecgs_per_row'] * plan['tokens_per_ecg']:,} of {plan['seq_len']:,} tokens)",
        f"in all         {plan['steps']:,} steps, {plan['ecgs_in_all']:,} ECGs ({plan['epochs']:.3g} x {plan['ecgs']:,}), {plan['tokens_in_all']:,} tokens",
        f"time           {_hours(plan['seconds'])}, {plan['gpu_hours']:,.1f} GPU-hours, {plan['step_seconds']:.2f} s a step,"
        f" if {100 * plan['mfu']:g} % of {plan['peak_flops'] / 1e12:,.0f} TFLOPS are reached (--mfu); validation and checkpoints not counted",
        f"on disk        {gb(plan['checkpoint'])} GB a checkpoint, {gb(plan['export'])} GB the model",
        "",
        f"GB a rank      {'weights':>9}{'gradients':>11}{'optimizer':>11}{'buffers':>9}{'host':>9}   at most, by --gradient_checkpointing",
        f"{'':64}" + "".join(f"{how:>11}" for how in plan["activations"]),
    ]
    for preset_name, state in plan["presets"].items():
        mark = "*" if state["chosen"] else " "
        if "refused" in state:
            lines.append(f"{mark} {preset_name:13}  refused: {state['refused']}")
            continue
        ends = "".join(f"{gb(most):>10}{'!' if most > plan['gpu_memory'] else ' '}" for most in state["peak"].values())
        parts = (state["weights"], state["gradients"] + state["transient"], state["optimizer"], state["buffers"], state["host"])
        numbers = zip((9, 11, 11, 9, 9), parts)
        lines.append(f"{mark} {preset_name:13}" + "".join(f"{gb(number):>{width}}" for width, number in numbers) + ends)
    parts = ", ".join(f"{gb(number)} ({how})" for how, number in plan["activations"].items())
    lines += [
        "",
        f"At most: weights, optimizer, buffers and the larger of activations ({parts}; the loss {gb(plan['loss'])}) and gradients, which come as those go.",
        "Planned by formula, with eager kernels; nothing was run.",
        "*: --deepspeed. !: does not fit the GPU. host: memory of the node, per rank.",
    ]
    if plan["reports_not_counted"]:
        lines.append("The run predicts reports too (--report_targets): their tokens, and the ECGs that they displace from a row, are not counted.")
    return "\n".join(lines)


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:,.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"


@exit_2_on_user_error
def main(argv: list[str] | None = None) -> None:
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # transformers 5.23 of peft 0.21
    args = parse(PlanArguments, __doc__, argv)
    given = any(word.split("=")[0] == "--shards" for word in argv or ())
    if args.shards and not given and not is_url(args.shards) and not Path(args.shards).exists():  # a recipe says where they will be
        print(f"{args.shards} is not there yet: planned for {args.ecgs or MIMIC:,} ECGs (--ecgs)", file=sys.stderr)
        args.shards = None
    found, show = (make_scaling(args), scaling.text) if args.scaling else (make_plan(args), text)
    print(json.dumps(found, indent=2) if args.json else show(found))


if __name__ == "__main__":
    main(sys.argv[1:])
