"""Resolve a DeepSpeed configuration: every "auto" from the arguments, and no setting that would be ignored in silence."""

import json
from pathlib import Path

from toolkit.errors import UserError

FORBIDDEN = {
    "optimizer": "the trainers bring AdamW: use --learning_rate and --weight_decay",
    "scheduler": "the trainers bring warm-up and cosine: use --warmup_steps",
    "activation_checkpointing": "it has no effect on Hugging Face models: use --gradient_checkpointing",
    "fp16": "use --precision bf16 or fp32",
    "torch_autocast": "use --precision bf16 or fp32",
}


def resolve(path: str, args, world: int, bf16: bool) -> dict:
    """The configuration with no "auto" left. Raises UserError naming the file, the key and the mend."""
    try:
        config = json.loads(Path(path).read_text())
    except OSError as error:
        raise UserError(f"--deepspeed: {path} cannot be read ({error.strerror}); the presets are in ds_configs/") from None
    except ValueError as error:
        raise UserError(f"--deepspeed: {path} is no valid JSON: {error}") from None
    if not isinstance(config, dict) or not all(isinstance(config.get(key, {}), dict) for key in ("bf16", "zero_optimization", "data_types")):
        raise UserError(f"--deepspeed: {path}: bf16, zero_optimization and data_types must be objects; the presets are in ds_configs/")
    for key, mend in FORBIDDEN.items():
        if key in config:
            raise UserError(f"--deepspeed: {path}: remove {key!r}: {mend}")
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage not in (0, 1, 2):
        raise UserError(f"--deepspeed: {path}: zero_optimization.stage {stage} is not supported yet; use ds_configs/zero2.json")
    values = {
        "train_micro_batch_size_per_gpu": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "train_batch_size": args.per_device_train_batch_size * args.gradient_accumulation_steps * world,
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
    if stage:  # stage 0 has no such choice
        config.setdefault("data_types", {})["grad_accum_dtype"] = "fp32"  # bf16 sums lose small gradients
    left = [f"{k}.{s}" for k, v in config.items() if isinstance(v, dict) for s in v if v[s] == "auto"]
    left += [k for k, v in config.items() if v == "auto"]
    if left:
        raise UserError(f"--deepspeed: {path}: no argument decides {left[0]!r}; write a value")
    return config
