"""Pretrain a causal LM on next-ECG-token prediction.

deepspeed launchers/pretrain.py --deepspeed ds_configs/zero2.json --backbone tiny --shards runs/demo/shards --output_dir runs/demo/pretrain

The output folder is a plain Hugging Face model with its tokenizer: `AutoModelForCausalLM.from_pretrained("runs/demo/pretrain")`.
`--max_steps 0` writes the backbone with the ECG vocabulary, untrained.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from toolkit.lm import attention
from toolkit.lm.backbone import STAMP, check_stamp, load_backbone, save_stamp
from toolkit.lm.model import PackedLM
from toolkit.lm.vocabulary import extend
from toolkit.shards.statistics import unigram_entropy
from toolkit.tasks.data import ForecastData
from toolkit.tasks.prompts import prefix_ids
from toolkit.training.arguments import TrainingArguments, arg, parse
from toolkit.training.distributed import launcher, start
from toolkit.training.loop import Job, train
from toolkit.training.shards import TrainingShardArguments, open_shards
from toolkit.training.validation import fixed_subset, mean_loss

WORDS = Path(__file__).resolve().parents[1] / "toolkit" / "lm" / "clinical_words.txt"
CORPUS = 50_000  # ECGs whose reports train the BPE of `tiny`
SHOWN, CONTINUED = 100, 24  # tokens given and predicted in the sample shown in TensorBoard


@dataclass(kw_only=True)
class PretrainArguments(TrainingShardArguments, TrainingArguments):
    backbone: str = arg("tiny (5 M parameters, made on the spot), smollm2, or any causal LM: a folder or a hub name such as meta-llama/Llama-3.2-3B.")
    shards: str = arg("Token shards written by `python -m sharding.shard`: a folder, or the URL of one (s3://, gs://, https://, ...).")
    report_targets: Literal["auto", "yes", "no"] = arg("Predict each ECG's report after it as well. auto: if the backbone never saw text (tiny).", "auto")
    gain_tokens: bool = arg("Put 12 tokens before each ECG that say its leads' amplitudes. A backbone that has such tokens goes on with them.", False)
    learning_rate: float | None = arg("Peak learning rate. Default 0.25 / hidden size: 1e-3 for tiny, 4e-4 for smollm2, 8e-5 for Llama-3.2-3B.", None)


def main() -> None:
    args = parse(PretrainArguments, __doc__)
    (shards, valid_shards), skipped = open_shards(args, ["train", "valid"], "tokens")
    # going on from a model that knows ECG tokens already: they must be these
    stamp = check_stamp(args.backbone, shards.index, "--backbone") if (Path(args.backbone) / STAMP).is_file() else None
    ranks = start()

    def corpus():
        yield from WORDS.read_text().splitlines() * 20
        yield from (shards.meta(i)["report"] for i in range(min(len(shards), CORPUS)))

    knows_text = stamp["knows_text"] if stamp else args.backbone != "tiny"
    model, tokenizer = load_backbone(args.backbone, corpus, args.seed)
    if args.learning_rate is None:
        args.learning_rate = 0.25 / model.config.hidden_size
    vocabulary = extend(model, tokenizer, shards.index["levels"], args.seed, knows_text, args.gain_tokens)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    reports = args.report_targets == "yes" or (args.report_targets == "auto" and not knows_text)
    data, valid = ForecastData(shards, tokenizer, vocabulary, reports), ForecastData(valid_shards, tokenizer, vocabulary)
    unigram = unigram_entropy(shards, valid_shards, fixed_subset(len(valid), args.max_eval_samples), vocabulary.codes)

    def loss(engine, row):
        return engine(row)

    def evaluate(engine) -> dict:
        nats = mean_loss(engine, valid, loss, ranks, args.max_eval_samples, args.per_device_train_batch_size)
        return {"eval_loss": nats, "eval_perplexity": math.exp(nats), "unigram_perplexity": math.exp(unigram)}

    @torch.no_grad()
    def sample(engine) -> str:
        ids = prefix_ids(tokenizer, vocabulary, valid_shards.ids(0), valid_shards.meta(0)["gains"])
        with attention.plain_attention(engine.module.lm) as plain:
            given = torch.from_numpy(ids[:SHOWN])[None].to(ranks.device)
            made = plain.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=CONTINUED, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        return f"true: {tokenizer.decode(ids[SHOWN:SHOWN + CONTINUED])}\n\npredicted: {tokenizer.decode(made[0, SHOWN:])}"

    def export(module, folder: Path) -> None:
        module.lm.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        save_stamp(folder, shards.index, knows_text)

    identity = {"shards digest": shards.digest, "skipped shards": skipped}
    train(args, Job(PackedLM(model), data, loss, evaluate, export, identity, sample), ranks, "pretrain")


if __name__ == "__main__":
    launcher(main)()
