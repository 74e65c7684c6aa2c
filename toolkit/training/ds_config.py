"""Resolve a DeepSpeed configuration: every "auto" from the arguments, and no setting that would be ignored in silence."""

import difflib
import json
from pathlib import Path

from deepspeed.runtime.precision_config import DeepSpeedBF16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import ValidationError

from toolkit.errors import UserError

FORBIDDEN = {
    "optimizer": "the trainers bring AdamW: use --learning_rate and --weight_decay",
    "scheduler": "the trainers bring warm-up and cosine: use --warmup_steps",
    "activation_checkpointing": "it has no effect on Hugging Face models: use --gradient_checkpointing",
    "fp16": "use --precision bf16 or fp32",
    "torch_autocast": "use --precision bf16 or fp32",
    "checkpoint": "the trainers decide it by themselves",
    "flops_profiler": "it counts padding and recomputation: the log has TFLOPS and MFU, --profile a trace",
    "tensorboard": "the trainers write TensorBoard files to --output_dir",
    "zero_force_ds_cpu_optimizer": "the trainers set it: offloaded states are stepped by torch's AdamW, which needs no compiler",
}
KNOWN = {
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping", "bf16", "zero_optimization", "data_types",
    "steps_per_print", "communication_data_type", "prescale_gradients", "gradient_predivide_factor", "wall_clock_breakdown", "memory_breakdown",
    "comms_logger", "dump_state", "log_level",
}  # fmt: skip
STAGES = (0, 1, 2, 3)
HARMFUL = {  # in bf16 and zero_optimization: what would take a promise back, or has no effect
    "check_grad_overflow": "without it a step that is not finite would change the weights",
    "bf16_master_weights_and_grads": "sums and weights of the optimizer are float32",
    "bf16_optimizer_states": "sums and weights of the optimizer are float32",
    "zero_quantized_gradients": "sums of gradients are float32",
    "elastic_checkpoint": "it has no effect: another number of ranks is taken care of by itself",
    "legacy_stage1": "DeepSpeed has no such optimizer any more",
    "cpu_offload": "write offload_optimizer, as ds_configs/zero2_offload.json does",
    "cpu_offload_params": "write offload_param, as ds_configs/zero3_offload.json does",
    "cpu_offload_use_pin_memory": "write it within offload_optimizer",
}
BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def read(path: str) -> dict:
    """The configuration as it stands in the file, its keys and types checked. Raises UserError naming the file, the key and the mend."""
    try:
        config = json.loads(Path(path).read_text())
    except OSError as error:
        raise UserError(f"--deepspeed: {path} cannot be read ({error.strerror}); the presets are in ds_configs/") from None
    except ValueError as error:
        raise UserError(f"--deepspeed: {path} is no valid JSON: {error}") from None
    if not isinstance(config, dict) or not all(isinstance(config.get(key, {}), dict) for key in ("bf16", "zero_optimization", "data_types")):
        raise UserError(f"--deepspeed: {path}: bf16, zero_optimization and data_types must be objects; the presets are in ds_configs/")
    for key in config:
        if key in FORBIDDEN:
            raise UserError(f"--deepspeed: {path}: remove {key!r}: {FORBIDDEN[key]}")
        if key not in KNOWN:
            near = difflib.get_close_matches(key, KNOWN, 1)
            raise UserError(f"--deepspeed: {path}: {key!r} is unknown to the trainers, " + (f"did you mean {near[0]!r}?" if near else "remove it"))
    zero = config.setdefault("zero_optimization", {})
    for section in ("bf16", "zero_optimization"):
        for key in HARMFUL.keys() & config.get(section, {}).keys():
            raise UserError(f"--deepspeed: {path}: remove {section}.{key}: {HARMFUL[key]}")
    for key in config.get("data_types", {}).keys() - {"grad_accum_dtype"}:
        raise UserError(f"--deepspeed: {path}: remove data_types.{key}: the trainers know grad_accum_dtype alone")
    if type(zero.setdefault("stage", 0)) is not int or zero["stage"] not in STAGES:
        raise UserError(f"--deepspeed: {path}: zero_optimization.stage must be one of {STAGES}, not {zero['stage']!r}")
    for part in ("offload_optimizer", "offload_param"):
        if zero.get(part) and zero["stage"] < (3 if part == "offload_param" else 1):
            raise UserError(f"--deepspeed: {path}: zero_optimization.{part} has no effect at stage {zero['stage']}; remove it or use a preset that has it")
        if isinstance(zero.get(part), dict) and zero[part].get("device") == "nvme":
            raise UserError(f"--deepspeed: {path}: zero_optimization.{part}.device nvme is not supported: checkpoints would not hold what is there; use cpu")
    for key in zero:
        if key.startswith("stage3_") and zero["stage"] < 3:
            raise UserError(f"--deepspeed: {path}: zero_optimization.{key} has no effect at stage {zero['stage']}; remove it")
    return config


def resolve(path: str, args, world: int, bf16: bool, hidden_size: int | None = None, split: tuple[int, int] | None = None) -> dict:
    """The configuration with no "auto" left.

    hidden_size: of the model, for the bucket sizes of ZeRO-3. split: (micro-batch, accumulation) where a resumed run cuts its batch in another way than
    `args` say. Raises UserError naming the file, the key and the mend.
    """
    config = read(path)
    if split:  # of another number of ranks: numbers in the file are those of the first start
        config = {key: value for key, value in config.items() if key not in BATCH}
    micro, accumulation = split or (args.per_device_train_batch_size, args.gradient_accumulation_steps)
    values = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro * accumulation * world,
        "gradient_clipping": args.max_grad_norm,
    }
    for key, value in values.items():
        if config.setdefault(key, "auto") == "auto":
            config[key] = value
        elif config[key] != value:
            raise UserError(f"--deepspeed: {path}: {key} is {config[key]}, the arguments say {value}; write \"auto\" or change the argument")
    precision = config.setdefault("bf16", {"enabled": "auto"})
    if precision.get("enabled", "auto") == "auto":
        precision["enabled"] = bf16
    elif precision["enabled"] != bf16:
        raise UserError(f"--deepspeed: {path}: bf16.enabled is {precision['enabled']}, this run's weights are {'bf16' if bf16 else 'fp32'}; write \"auto\"")

    zero = config["zero_optimization"]
    if hidden_size:  # the rules that users know from the Hugging Face Trainer
        rules = {
            "reduce_bucket_size": hidden_size**2,
            "stage3_prefetch_bucket_size": int(0.9 * hidden_size**2),
            "stage3_param_persistence_threshold": 10 * hidden_size,
        }
        zero |= {key: value for key, value in rules.items() if zero.get(key) == "auto"}
    types = config.setdefault("data_types", {})
    if types.setdefault("grad_accum_dtype", "fp32") not in ("fp32", "auto"):
        raise UserError(f"--deepspeed: {path}: data_types.grad_accum_dtype must be fp32: sums in {types['grad_accum_dtype']} lose small gradients")
    types["grad_accum_dtype"] = "fp32"
    if zero["stage"] == 0:
        if bf16 and accumulation > 1:  # DeepSpeed has nothing but bf16 sums at stage 0
            what = "use ds_configs/zero1.json" if split is None else "resume it with as many ranks as before"
            raise UserError(f"--deepspeed: {path}: ZeRO stage 0 would sum the micro-batches' gradients in bf16; {what}")
        del types["grad_accum_dtype"]
    config["zero_force_ds_cpu_optimizer"] = False
    if left := _autos(config):
        raise UserError(f"--deepspeed: {path}: no argument decides {left[0]!r}; write a value")
    for section, model in (("zero_optimization", DeepSpeedZeroConfig), ("bf16", DeepSpeedBF16Config)):
        try:
            model(**config[section])
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, (section, *first["loc"])))
            near = difflib.get_close_matches(str(first["loc"][-1]), model.model_fields, 1) if first["type"] == "extra_forbidden" else []
            mend = f"did you mean {near[0]!r}?" if near else "remove it or mend it"
            raise UserError(f"--deepspeed: {path}: {key}: {first['msg'].lower()}; {mend}") from None
    return config


def _autos(config: dict, before: str = "") -> list[str]:
    """Names of the settings that are still "auto"."""
    here = [before + key for key, value in config.items() if value == "auto"]
    return here + [name for key, value in config.items() if isinstance(value, dict) for name in _autos(value, f"{before}{key}.")]
