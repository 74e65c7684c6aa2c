"""LoRA-tune a pretrained model to answer questions on ECGs and to write reports. The loss is on the answers alone.

deepspeed launchers/instruct.py --deepspeed ds_configs/zero2.json --backbone runs/demo/pretrain --shards runs/demo/tasks --output_dir runs/demo/instruct

The output folder is a PEFT adapter: `PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BACKBONE), "runs/demo/instruct")`.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from toolkit.errors import UserError
from toolkit.evaluation.generate import answer_tasks
from toolkit.files import digest
from toolkit.lm import attention, kernels
from toolkit.lm.backbone import check_stamp, load_backbone, save_stamp
from toolkit.lm.checkpointing import checkpoint_layers
from toolkit.lm.flops import row_flops
from toolkit.lm.lora import add_lora, save_adapter
from toolkit.lm.model import PackedLM
from toolkit.lm.vocabulary import ecg_vocabulary
from toolkit.shown import Shown
from toolkit.tasks.data import TaskData
from toolkit.tasks.prompts import question_text, reference_text
from toolkit.training.arguments import LanguageModelArguments, arg, parse
from toolkit.training.distributed import launcher, start
from toolkit.training.loop import Job, train
from toolkit.training.resume import RESULTS
from toolkit.training.shards import TrainingShardArguments, open_shards
from toolkit.training.validation import mean_loss
from toolkit.training.zero3 import place_backbone, whole_state


@dataclass(kw_only=True)
class InstructArguments(TrainingShardArguments, LanguageModelArguments):
    backbone: str = arg("Folder written by launchers/pretrain.py.")
    shards: str = arg("Task shards written by `python -m sharding.shard_tasks`: a folder, or the URL of one (s3://, gs://, https://, ...).")
    tasks_per_ecg: int = arg("Questions and reports per ECG and epoch; an ECG with more gets another selection each epoch.", 8)
    gain_text: bool = arg("Say each lead's amplitude in the prompt, in words: for a backbone without gain tokens (--gain_tokens of pretrain).", False)
    train_rows: Literal["auto", "all", "none"] = arg("Train the embedding's rows beside LoRA. auto: all if the backbone never saw text (tiny).", "auto")
    lora_r: int = arg("Rank of LoRA.", 16)
    lora_alpha: int = arg("LoRA scale is alpha / rank.", 16)
    lora_dropout: float = arg("Dropout before LoRA.", 0.0)
    learning_rate: float | None = arg("Peak learning rate. Default 0.77 / hidden size: 3e-3 for tiny, 1.3e-3 for smollm2, 2.5e-4 for Llama-3.2-3B.", None)
    per_device_train_batch_size: int = arg("ECGs (with all their tasks) per rank and micro-batch.", 2)


def main() -> None:
    args = parse(InstructArguments, __doc__)
    (shards, valid_shards), skipped = open_shards(args, ["train", "valid"], "tasks")
    stamp = check_stamp(args.backbone, shards.index, "--backbone")
    if (Path(args.backbone) / "adapter_config.json").is_file():
        raise UserError(f"--backbone: {args.backbone} is an adapter; name the folder of launchers/pretrain.py that it was trained on")
    if not (Path(args.backbone) / RESULTS).is_file():
        raise UserError(f"--backbone: the training of {args.backbone} is not complete; run its launchers/pretrain.py command again")
    backbone = str(Path(args.backbone).resolve())  # the adapter's configuration remembers it
    ranks = start()
    model, tokenizer = place_backbone(lambda: load_backbone(backbone, tuple, args.seed), args, ranks)
    vocabulary = replace(ecg_vocabulary(tokenizer), gain_text=args.gain_text)
    if args.gain_text and vocabulary.gain_first is not None:
        raise UserError(f"--gain_text: {args.backbone} has gain tokens, which say the same; leave it out")
    torch.manual_seed(args.seed)
    every_row = args.train_rows == "all" or (args.train_rows == "auto" and not stamp["knows_text"])
    rows = range(len(tokenizer)) if every_row else range(0)
    if args.learning_rate is None:
        args.learning_rate = 0.77 / model.config.hidden_size
    lm = add_lora(model, args.lora_r, args.lora_alpha, args.lora_dropout, rows)
    checkpoint_layers(lm, args.gradient_checkpointing)
    if args.compile:
        kernels.compile_layers(lm)
    data, valid = (TaskData(s, tokenizer, vocabulary, args.tasks_per_ecg, args.seed) for s in (shards, valid_shards))

    def loss(engine, row):
        return engine(row)

    def evaluate(engine) -> dict:
        return {"eval_loss": mean_loss(engine, valid, loss, ranks, args.max_eval_samples, args.per_device_train_batch_size)}

    def show(engine) -> Shown:
        meta = valid_shards.meta(0)
        with attention.plain_attention(engine.module.lm) as plain:
            answers = answer_tasks(plain, tokenizer, vocabulary, [(valid_shards.ids(0), meta["gains"], meta["tasks"])], 64, ranks.device)[0]
        lines = [f"{question_text(t)} {given} (reference: {reference_text(t)})" for t, given in zip(meta["tasks"], answers)]
        return Shown(texts={"samples": "\n\n".join(lines)}, images={}, histograms={})

    def export(module, folder: Path) -> None:
        state = whole_state(module.lm, ranks, trained_only=True)
        if ranks.main:
            save_adapter(module.lm, folder, state)
            tokenizer.save_pretrained(folder)
            save_stamp(folder, shards.index, knows_text=True, gain_text=args.gain_text)

    identity = {"shards digest": shards.digest, "skipped shards": skipped, "backbone digest": digest(Path(backbone) / RESULTS)}
    packed = PackedLM(lm, kernels.apply(lm, args.kernels, ranks.device))
    train(args, Job(packed, data, loss, evaluate, export, identity, show, row_flops(lm), model.config.hidden_size), ranks, "instruct")


if __name__ == "__main__":
    launcher(main)()
