"""What a rank holds in memory during training, by formula: the state of ZeRO's stages, activations, the loss.

The bytes of each part were compared with what a real engine of DeepSpeed 0.19.8 holds (tests/training/test_memory_plan.py). Not counted: what CUDA, NCCL and
the fragmentation of the allocator take, for which GPUs in `toolkit.lm.flops.GPUS` have fewer bytes than the driver says.
"""

from dataclasses import dataclass

import torch
from transformers import AttentionInterface, PreTrainedModel

from toolkit.lm.checkpointing import layers_apart
from toolkit.lm.kernels import CHUNK

COUNTING = "heartspeed_counting"
LIVE = 10**9  # DeepSpeed's stage3_max_live_parameters
FLAT = 5 * 10**8  # numbers that DeepSpeed's engine sends at a time (MEMORY_OPT_ALLREDUCE_SIZE), and no less than a whole parameter


@dataclass
class State:
    """Bytes per rank that do not depend on the batch; `host` is in the memory of the node, per rank.

    gradients: when the last micro-batch's backward pass ends; kept: those of them that are there in its forward pass already; begun: those that are there
    as soon as the backward pass has begun, where that is more; transient: what is there beside them for a moment, as they are reduced or as the weights are
    updated.
    """

    weights: float
    gradients: float
    optimizer: float
    buffers: float
    host: float = 0.0
    kept: float = 0.0
    begun: float = 0.0
    transient: float = 0.0


def state_bytes(zero: dict, total: int, trained: int, world: int, bf16: bool, largest: int = 0, accumulates: bool = False) -> State:
    """What ZeRO keeps on a rank (Rajbhandari et al., arXiv 1910.02054, section 5, with DeepSpeed's own buffers).

    zero: the section `zero_optimization`, resolved. total, trained: numbers of parameters; largest: of the largest trained one. AdamW in fp32 has 12 bytes a
    trained parameter: the weight and two moments. Stages 1-3 divide them by the ranks, stages 2 and 3 the gradients' fp32 sums too, stage 3 the weights as
    well. In bf16 stage 1 holds the whole sums in fp32 beside the bf16 gradients; stage 0 makes fp32 gradients for the step. In fp32 stages 1-3 keep a second
    copy of the rank's part of the weights, stage 0 none. Buffers: reduction buckets (two with overlap_comm), and in stage 3 the weights that are gathered
    at a time, at most stage3_max_live_parameters. Transient: stages 0 and 1 in bf16 lay gradients end to end, 500 M at a time, to send them; stages 2 and 3
    have whole ones of a layer until they are cut (a tied embedding's twice); stage 2 takes the norm in fp64, a parameter at a time.
    Stage 2 makes the place for its part of the sums with the first gradient.
    """
    stage, size = zero["stage"], 2 if bf16 else 4
    bucket = min(zero.get("reduce_bucket_size", 5 * 10**8), 10**12) * size
    sent_at_a_time = min(trained, FLAT + largest)
    if stage == 0:
        held = dict(kept=4 * trained * accumulates, transient=4 * (trained if bf16 else sent_at_a_time))
        return State(size * total, size * trained, (12 if bf16 else 8) * trained, 0, **held)
    optimizer, part = 12 * trained / world, 4 * trained / world
    if stage == 1:
        if bf16:
            return State(size * total, 6 * trained, optimizer, 0, kept=4 * trained, transient=6 * sent_at_a_time)
        return State(size * total, 4 * trained, optimizer, bucket, kept=4 * trained * accumulates, transient=part)
    whole = 2 * size * largest
    if stage == 2:
        in_norm = 8 * min(largest, trained / world)
        own = size * trained / world if bf16 or accumulates else 0
        state = State(size * total, part, optimizer, bucket * (2 if zero.get("overlap_comm") else 1), kept=part * accumulates, begun=part + size * largest)
        state.transient = max(own + whole, in_norm if bf16 else part)
    else:
        live = size * min(total, zero.get("stage3_max_live_parameters", LIVE))
        state = State(size * total / world, part, optimizer, bucket + live, kept=part, transient=max(whole, part))
    if zero.get("offload_optimizer"):  # two fp32 copies of the gradients stand in the node's memory, and in stage 2 one of the weights
        state.host, state.gradients, state.optimizer = 2 * part + optimizer + (size * trained / world if stage == 2 else 0), 0, 0
        state.kept, state.begun, state.transient = 0, 0, whole
    if zero.get("offload_param"):
        state.host, state.weights = state.host + state.weights, 0
    return state


def peak_bytes(state: State, activations: float, loss: float) -> float:
    """The most that a rank holds at a time: as the forward pass ends, as the backward pass begins, or as the gradients are whole and reduced. (Between these
    a layer's activations go as its gradients come.)"""
    forward, backward = state.kept + activations + loss, state.begun + activations
    return state.weights + state.optimizer + state.buffers + max(forward, backward, state.gradients + state.transient)


def loss_bytes(rows: int, width: int, trained: bool, bf16: bool) -> float:
    """The most that toolkit/lm/kernels.linear_cross_entropy holds at a time, for a head of [rows, width]: two chunks of logits (the last one's gradient
    and the next one, in bf16 both before and after it is made fp32) and of a trained head the gradient in fp32 with what is added to it. Backward scales
    that (a second fp32 copy) and rounds it to the weights' dtype."""
    head = rows * width * trained
    return max(8 * CHUNK * rows + head * (6 if bf16 else 8), head * (10 if bf16 else 8))


class _Attend(torch.autograd.Function):
    """Attention as fused kernels are: it keeps its inputs, the output and a log-sum a query, not the square of scores. Only counted, so without a backward."""

    @staticmethod
    def forward(ctx, query, key, value):
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out


def layer_bytes(base: PreTrainedModel, tokens: int) -> float:
    """Bytes that autograd keeps of `tokens` tokens in one decoder layer (what is outside of the layers is shared out among them), with eager kernels.

    base: a model on the meta device in the dtype of the run; its forward pass is run there and what it saves for backward is counted.
    """
    AttentionInterface.register(COUNTING, lambda module, q, k, v, mask, **more: (_Attend.apply(q, k, v).transpose(1, 2).contiguous(), None))
    before = base.config._attn_implementation
    base.set_attn_implementation(COUNTING)
    weights = {p.untyped_storage()._cdata for p in base.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = tensor  # alive, so that no other storage gets its address
        return tensor

    n = 256  # all but the square of attention, which is not kept, grows with the tokens
    place = torch.zeros(1, n, dtype=torch.long, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        base.get_decoder()(input_ids=place, position_ids=place, use_cache=False)
    base.set_attn_implementation(before)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / n * tokens / base.config.get_text_config().num_hidden_layers


def activation_bytes(layer: float, layers: int, inputs: float, how: str) -> float:
    """Bytes of activations with `--gradient_checkpointing how` (none, full, every_N): a recomputed layer keeps its input alone, and one is there again.

    layer: of `layer_bytes`; inputs: bytes of a layer's input. Raises UserError naming --gradient_checkpointing for another word.
    """
    every = layers_apart(how)
    recomputed = layers // every if every else 0
    return (layers - recomputed) * layer + (recomputed * inputs + layer if recomputed else 0)
