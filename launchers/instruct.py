"""LoRA-tune a pretrained model to answer questions on ECGs and to write reports. The loss is on the answers alone.

deepspeed launchers/instruct.py --deepspeed ds_configs/zero2.json --backbone runs/demo/pretrain --shards runs/demo/tasks --output_dir runs/demo/instruct

The output folder is a PEFT adapter: `PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BACKBONE), "runs/demo/instruct")`.
With --eval_steps it is the one with the best exact match of all validations (of equal ones, and without questions: the lowest loss), and last/ the last.
"""

import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from toolkit.errors import UserError
from toolkit.evaluation.cards import tokenizer_of
from toolkit.files import digest
from toolkit.lm import kernels
from toolkit.lm.backbone import backbone_digest, load_backbone, save_stamp
from toolkit.lm.carried import FOLDER
from toolkit.lm.checkpointing import checkpoint_layers
from toolkit.lm.continuous import ECGAdapter, fitted
from toolkit.lm.flops import row_flops
from toolkit.lm.lora import add_lora, save_adapter
from toolkit.lm.model import PackedLM
from toolkit.lm.quantize import check_nf4, load_nf4
from toolkit.lm.trainable import ecg_rows
from toolkit.lm.vocabulary import ecg_vocabulary
from toolkit.shards.reader import Shards
from toolkit.shown import Shown
from toolkit.tasks.instruct import TaskData
from toolkit.tasks.mixture import TEXT, parse_mixture, read_text
from toolkit.tasks.prompts import Prompts, Style
from toolkit.tasks.vocabulary import ECGVocabulary
from toolkit.tokenizer.features import ECGFeatures
from toolkit.training import ds_config
from toolkit.training.arguments import LanguageModelArguments, arg, parse
from toolkit.training.distributed import launcher, start, sum_over_ranks, wants_bf16
from toolkit.training.loop import Job, train
from toolkit.training.shards import TrainingShardArguments, check_together, open_shards, trained_on
from toolkit.training.tuning import check_lora, exact_match, questions_of, shown
from toolkit.training.untrained import prepare_backbone
from toolkit.training.validation import mean_loss
from toolkit.training.zero3 import place_backbone, whole_state


@dataclass(kw_only=True)
class InstructArguments(TrainingShardArguments, LanguageModelArguments):
    stage: ClassVar = "instruct"

    backbone: str = arg(
        "Folder written by launchers/pretrain.py; or, to tune without ECG pretraining, tiny, smollm2 or any causal LM: its ECG tokens then start untrained."
    )
    shards: list[str] = arg("Task shards written by `python -m sharding.shard_tasks`: folders or URLs (s3://, gs://, https://, ...), mixed into one set.")
    prompt: Style = arg("ecg_first: the ECG once, then its questions. chat: so in the backbone's chat template. paper: as the authors' release.", "ecg_first")
    background: bool = arg("Say age and sex in the prompt where the shards know them.", False)
    gain_text: bool = arg("Say each lead's amplitude in the prompt, in words: for a backbone without gain tokens (--gain_tokens of pretrain).", False)
    ecg_input: Literal["tokens", "continuous"] = arg(
        "continuous: an ECG is not put in as its tokens' embeddings but as the ECG encoder's features before they are quantised, through a linear layer that is"
        " trained; needs the recordings, here and in evaluate.py.", "tokens"
    )  # fmt: skip
    tasks: str = arg(
        "What is tuned on: all, ecgqa, report, a question type, or a mixture with shares of the samples such as ecgqa:0.7,report:0.3 or all:0.9,text:0.1."
        " Shares need not sum to 1. A sample is an ECG with all its tasks of that kind.", "all"
    )  # fmt: skip
    text: str | None = arg(
        'Text to replay against forgetting, in samples of 256 tokens: a .jsonl file of {"text": ...}, or any other with empty lines between documents.', None
    )
    tasks_per_ecg: int = arg("Most questions and reports per ECG and epoch, another selection each epoch. 0: all.", 0)
    train_rows: Literal["auto", "all", "ecg", "none"] = arg(
        "Rows of embedding and head trained beside LoRA: all, or the ECG tokens' alone. auto: all if the backbone never saw text (tiny), else ecg.", "auto"
    )
    train_norms: bool = arg("Train the norm layers beside LoRA, as the authors' release.", False)
    lora_r: int = arg("Rank of LoRA.", 16)
    lora_alpha: int = arg("LoRA scale is alpha / rank.", 16)
    lora_dropout: float = arg("Dropout before LoRA.", 0.0)
    lora_targets: list[str] = arg("Linear layers with LoRA: all-linear, or names such as q_proj v_proj.", ["all-linear"])
    quantize: Literal["none", "nf4"] = arg("nf4: the frozen weights in 4 bits (QLoRA), on GPUs with bitsandbytes; not with ZeRO-3.", "none")
    learning_rate: float | None = arg("Peak learning rate. Default 0.77 / hidden size: 3e-3 for tiny, 1.3e-3 for smollm2, 2.5e-4 for Llama-3.2-3B.", None)
    per_device_train_batch_size: int = arg("ECGs (with all their tasks) per rank and micro-batch.", 2)
    max_eval_answers: int = arg("Validate exact match on the answers to this many ECGs, evenly spaced over the valid split. 0: on none.", 64)


def main() -> None:
    args = parse(InstructArguments, __doc__)
    mixture = parse_mixture(args.tasks)
    folders = [open_shards(replace(args, shards=folder), ["train", "valid"], "tasks") for folder in args.shards]
    shards, valid_shards = ([both[part] for both, _ in folders] for part in (0, 1))
    check_together(shards, valid_shards)
    ranks = start()
    backbone, stamp = prepare_backbone(args.backbone, args.output_dir, shards, args.seed, ranks)
    if args.quantize == "nf4":
        check_nf4(ranks.device, ds_config.read(args.deepspeed)["zero_optimization"]["stage"])
        if not wants_bf16(args):
            raise UserError("--quantize nf4: what is trained beside the 4 bits is in bf16; use --precision bf16")
        model, tokenizer = load_nf4(backbone, ranks.device)
    else:
        model, tokenizer = place_backbone(lambda: load_backbone(backbone, tuple, args.seed), args, ranks, backbone)
    vocabulary, prompts = ecg_vocabulary(tokenizer), Prompts(args.prompt, args.gain_text, args.background)
    prompts.check(tokenizer, vocabulary)
    features, adapter = continuous_input(shards, model, vocabulary) if args.ecg_input == "continuous" else (None, None)
    torch.manual_seed(args.seed)  # LoRA's first weights, the same on all ranks
    every_row = args.train_rows == "all" or (args.train_rows == "auto" and not stamp["knows_text"])
    rows = range(len(tokenizer)) if every_row else [] if args.train_rows == "none" else ecg_rows(vocabulary)
    hidden_size = model.config.hidden_size
    if args.learning_rate is None:
        args.learning_rate = 0.77 / hidden_size
    how = kernels.apply(model, args.kernels, ranks.device)  # before PEFT wraps the norms
    lm = add_lora(model, args.lora_r, args.lora_alpha, args.lora_dropout, args.lora_targets, rows, args.train_norms)
    checkpoint_layers(lm, args.gradient_checkpointing)
    if args.compile:
        kernels.compile_layers(lm)
    context = getattr(model.config, "max_position_embeddings", None)
    text = read_text(args.text, tokenizer) if args.text else None
    data = TaskData(shards, tokenizer, vocabulary, prompts, args.seed, args.tasks_per_ecg, mixture, text, context, features and features.of)
    if ranks.main and data.shares:
        print(f"an epoch is {len(data)} samples: {data.shares}", flush=True)
    known = tuple(replace(share, weight=None) for share in mixture if share.name != TEXT)
    valid = TaskData(valid_shards, tokenizer, vocabulary, prompts, mixture=known, context=context, features=features and features.of)
    watched, how_asked = questions_of(valid, args.max_eval_answers), (tokenizer, vocabulary, prompts)
    ecg_tokenizer = tokenizer_of(shards[0]) if "tokenizer_files" in shards[0].index else None
    kinds = {kind: "report" if kind == "report" else "ecgqa" for folder in shards for kind in folder.index["splits"]["train"].get("tasks", {})}
    tuned_on = sorted(kind for kind, task in kinds.items() if any(share.wants({"task": task, "question_type": kind}) for share in mixture))

    def loss(engine, row):
        return engine(row)

    def evaluate(engine) -> dict:
        found = {"eval_loss": mean_loss(engine, valid, loss, ranks, args.max_eval_samples, args.per_device_train_batch_size)}
        return found | (exact_match(engine, how_asked, watched, ranks) if watched else {})

    def show(engine) -> Shown:
        return shown(engine, how_asked, [valid.sample(i) for i in valid.firsts], ranks)

    def check(module) -> None:
        check_lora(module, ranks)

    def export(module, folder: Path) -> None:
        state = whole_state(module.lm, ranks, trained_only=True)
        of_adapter = whole_state(module.adapter, ranks) if module.adapter else {}
        if ranks.main:
            save_adapter(module.lm, folder, state)
            tokenizer.save_pretrained(folder)
            if module.adapter:
                module.adapter.save(folder, of_adapter)
            if ecg_tokenizer:
                ecg_tokenizer.save_pretrained(folder / FOLDER)
            more = {"ecg_input": args.ecg_input} if module.adapter else {}
            more |= {"prompts": asdict(prompts), "tuned_on": tuned_on, "trained_on": trained_on(stamp, shards, args.shards)}
            more |= {"chosen_on": "valid"} if args.eval_steps else {}
            save_stamp(folder, shards[0].index, knows_text=True, **more)

    identity = {"shards digest": ", ".join(folder.digest for folder in shards), "skipped shards": [skipped for _, skipped in folders],
                "text digest": digest(args.text) if args.text else None, "backbone digest": backbone_digest(backbone, model)}  # fmt: skip
    if args.eval_steps:  # validations choose the best adapter, so a resumed run must have the same
        identity |= {name: getattr(args, name) for name in ("eval_steps", "max_eval_samples", "max_eval_answers")}
    job = Job(PackedLM(lm, how, adapter=adapter), data, loss, evaluate, export, identity, show, row_flops(lm), hidden_size,
              watch="eval_exact_match" if watched else "eval_loss", keep_last=True, check=check)  # fmt: skip
    train(args, job, ranks, "instruct")
    cut, left_out = map(int, sum_over_ranks([data.cut, data.left_out], ranks.device))
    if ranks.main and (cut or left_out):
        print(f"{cut} answers were cut to the backbone's context of {context} tokens, {left_out} tasks left out that have no room in it")


def continuous_input(shards: list[Shards], model, vocabulary: ECGVocabulary) -> tuple[ECGFeatures, ECGAdapter]:
    """Collective under ZeRO-3. Where features come from, and the layer that they go through, as it is before training."""
    features = ECGFeatures(tokenizer_of(shards[0]))
    measured, codes = features.measure(shards)
    return features, fitted(model, vocabulary.code_rows, features.mean, features.std, measured, codes)


if __name__ == "__main__":
    launcher(main)()
