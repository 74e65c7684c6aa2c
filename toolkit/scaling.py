"""What data parallelism costs on 1 to 512 GPUs, by formula: bytes that a rank sends in a step, the time of it, efficiency. `python -m toolkit.plan --scaling`

What is sent was read off DeepSpeed 0.19.8 and counted in its real engine (tests/test_scaling.py); it is not in all what the ZeRO paper says: stages 1 and 2
all-reduce the gradients where the paper reduce-scatters them. The time is that of a ring (Patarasuk & Yuan 2009, "Bandwidth optimal all-reduce algorithms
for clusters of workstations"), latency not counted.
"""

from collections.abc import Hashable
from dataclasses import dataclass

WORLDS = tuple(2**i for i in range(10))  # 1 to 512
PASSES = {"all-reduce": 2, "reduce-scatter": 1, "all-gather": 1}  # how often the ring carries the buffer, but for one part of as many as there are ranks
REUSE = 10**9  # DeepSpeed's stage3_max_reuse_distance


@dataclass(frozen=True)
class Links:
    """GB/s (10^9 bytes) in one direction: `intra` of a GPU to others of its node, `inter` of a whole node to others."""

    gpus_per_node: int
    intra: float
    inter: float


@dataclass(frozen=True)
class Cost:
    """Of a step: bytes that a rank sends to others of its node and (the mean over ranks) of other nodes, and seconds until they are there."""

    intra: float
    inter: float
    seconds: float


def volumes(zero: dict, uses: list[tuple[Hashable, int]], trained: int, micro_batches: int, size: int) -> dict[str, float]:
    """Bytes of each collective's buffers on a rank in one optimizer step, as DeepSpeed 0.19.8 calls them (cf. Rajbhandari et al., arXiv 1910.02054, section 7).

    zero: the section `zero_optimization`, resolved. uses: as `gathered` takes them. trained: number of parameters. size: bytes of a number, 2 in bf16.
    Stage 0 all-reduces the gradients; stage 1 too, and gathers the updated weights; both once a step. Stage 2 all-reduces those of each micro-batch (DeepSpeed
    sends whole buckets to all ranks, use_multi_rank_bucket_allreduce). Stage 3 scatters them, and gathers weights for each micro-batch.
    """
    stage, gradients = zero["stage"], size * trained
    if stage == 0:
        return {"all-reduce": gradients}
    if stage == 3:
        weights = size * gathered(uses, zero.get("stage3_max_reuse_distance", REUSE))
        return {"reduce-scatter": micro_batches * gradients, "all-gather": micro_batches * weights}
    return {"all-reduce": gradients * (micro_batches if stage == 2 else 1), "all-gather": gradients}


def gathered(uses: list[tuple[Hashable, int]], reuse: float) -> int:
    """How many numbers ZeRO-3 gathers for a micro-batch: all in the forward and all in the backward pass, but for those that it keeps from one use to the next.

    uses: (parameter, its size) in the order of the forward pass; a tied embedding is there twice. reuse: a parameter is kept if less than so many numbers are
    used before it is used again. Recomputed layers are near their backward pass and gathered once. DeepSpeed keeps a few more that it fetched ahead.
    """
    order = [*uses, *reversed(uses)]
    passed, ends, total = 0, {}, 0  # ends: how many numbers had been used when the last use of a parameter was over
    for parameter, numel in order:
        if parameter not in ends or passed - ends[parameter] >= reuse:
            total += numel
        passed += numel
        ends[parameter] = passed
    return total


def cost(buffers: dict[str, float], world: int, links: Links) -> Cost:
    """Of collectives over a ring of `world` ranks that are numbered node by node.

    A ring carries (world - 1) / world of a buffer over each of its links, an all-reduce twice. Of the links of a ring as many as there are nodes lead from
    one to the next; a node's network cards share the rings, so a node sends what a rank of one ring would.
    """
    sent = sum(PASSES[kind] * size for kind, size in buffers.items()) * (world - 1) / world
    nodes = -(-world // links.gpus_per_node)
    between = nodes / world if nodes > 1 else 0.0
    seconds = max(sent * (1 - between) / links.intra, sent / links.inter if between else 0.0) / 1e9
    return Cost(sent * (1 - between), sent * between, seconds)


def hideable(zero: dict, buffers: dict[str, float]) -> dict[str, float]:
    """Of `volumes` what DeepSpeed can send while it computes: at stage 3 all of it, without `overlap_comm` (there on by default) the weights that it fetches
    ahead; at stages 1 and 2 the gradients, with `overlap_comm` alone. The updated weights of these are waited for, and so is all of stage 0.
    """
    overlap = zero.get("overlap_comm", zero["stage"] == 3)
    kinds = {"all-gather"} if zero["stage"] == 3 else set()
    if overlap and zero["stage"]:
        kinds |= {"all-reduce", "reduce-scatter"}
    return {kind: size for kind, size in buffers.items() if kind in kinds}


def efficiency(compute: float, communication: float, hidden: float) -> tuple[float, float]:
    """Share of a step's time that is computation: if none of the communication is hidden behind it, and at best. hidden: seconds of it that can be."""
    return compute / (compute + communication), compute / (max(compute, hidden) + communication - hidden)


def text(found: dict) -> str:
    """The scaling as it is printed; GB are 10^9 bytes."""
    gb = lambda number: f"{number / 1e9:,.1f}"
    links = found["links"]
    lines = [
        f"{found['backbone']}: train {found['train']}, {found['precision']}, {found['gpu']} of {gb(found['gpu_memory'])} GB, {links['gpus_per_node']} a node;"
        f" {links['intra']:g} GB/s from a GPU within its node, {links['inter']:g} GB/s from a node to others",
        f"each GPU        {found['rows']} rows of {found['tokens_per_row']:,} tokens ({found['ecgs_per_row']} ECGs) a step,"
        f" {found['compute_seconds']:.3f} s of computing if {100 * found['mfu']:g} % of {found['peak_flops'] / 1e12:,.0f} TFLOPS are reached (--mfu)",
        "",
        f"{'':6}{'global batch':>17}   {'GB of a rank':<53}   {'GB that it sends':<19}   {'seconds':<7}   efficiency",
        f"{'GPUs':>6}{'rows':>8}{'ECGs':>9}{'weights':>10}{'gradients':>11}{'optimizer':>11}{'activations':>13}{'at most':>10}{'in node':>11}{'between':>9}"
        f"{'to send':>11}{'in turn':>11}{'at best':>9}",
    ]  # fmt: skip
    for name, preset in found["presets"].items():
        if "refused" in preset:
            lines += ["", f"{name}  refused: {preset['refused']}"]
            continue
        moved = ", ".join(f"{kind} {gb(size)} GB" for kind, size in preset["collectives"].items())
        lines += ["", f"{name}{'*' if preset['chosen'] else ''}  {moved}" + ("; PCIe and AdamW on the CPU come on top" if preset["offload"] else "")]
        for row in preset["worlds"]:
            memory, full = row["memory"], "!" if row["memory"]["peak"] > found["gpu_memory"] else " "
            widths = {"weights": 10, "gradients": 11, "optimizer": 11, "activations": 13, "peak": 10}
            lines.append(
                f"{row['world']:>6}{row['rows']:>8,}{row['ecgs']:>9,}" + "".join(f"{gb(memory[part]):>{width}}" for part, width in widths.items())
                + f"{full}{gb(row['intra']):>10}{gb(row['inter']):>9}{row['seconds']:>11.3f}"
                f"{100 * row['efficiency_in_turn']:>9.0f} %{100 * row['efficiency_at_best']:>7.0f} %"
            )  # fmt: skip
    lines += [
        "",
        "Weak scaling: each GPU's batch stays, the global batch grows. At most: of what is there at a time, with buffers. !: does not fit. *: --deepspeed.",
        "In turn: nothing of the communication is behind computing. At best: all that DeepSpeed does not wait for is (gradients with overlap_comm,",
        "weights at stage 3), which no run reaches. Latency and stragglers are not counted.",
    ]
    return "\n".join(lines)


def order_of_use(lm, base) -> list[tuple[Hashable, int]]:
    """`uses` of a model: its parameters in the order of its modules, with a tied head's weight once more at the end."""
    uses = [(id(p), p.numel()) for p in lm.parameters()]
    head = base.get_output_embeddings().weight
    return uses + ([(id(head), head.numel())] if head is base.get_input_embeddings().weight else [])
