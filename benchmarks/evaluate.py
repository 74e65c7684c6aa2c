"""Answers per second of launchers/evaluate.py's generation, against one task at a time with `transformers`' generate, which computes the ECG each time.

    python benchmarks/evaluate.py --model runs/demo/instruct --shards runs/demo/tasks --split test
    python benchmarks/evaluate.py --model M --shards I --split valid --ecgs 16 --rounds 5        # any model and split

Also beside generate in batches of --rows, padded on the left, which shares no ECG either. All three answer the same tasks greedily with ECG
tokens masked out, in one process and in turns; the medians of the rounds are compared, and in fp32 the answers must be the same. What is timed begins with the
samples in memory and ends with text.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from toolkit.errors import UserError, exit_2_on_user_error
from toolkit.evaluation.answering import plan, survey
from toolkit.evaluation.generate import answer_tasks
from toolkit.lm.trained import load_trained
from toolkit.shards.order import spaced
from toolkit.shards.reader import Shards
from toolkit.tasks.prompts import end_id, prompt_ids, shared_ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path, help="folder of launchers/instruct.py, pretrain.py or toolkit.lm.merge")
    parser.add_argument("--shards", required=True, help="task shards")
    parser.add_argument("--split", default="test", choices=("train", "valid", "test"), help="(default: %(default)s)")
    parser.add_argument("--ecgs", type=int, default=16, help="evenly spaced over the split, each with all its tasks (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="ECGs per batch of ours, with all their tasks (default: %(default)s, as the launcher's)")
    parser.add_argument("--rows", type=int, default=16, help="tasks per batch of generate (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="in bf16 the order of sums decides between near words (default: fp32)")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shards = Shards.open(args.shards, args.split, kind="tasks")
    model, tokenizer, vocabulary, prompts, adapter = load_trained(args.model, shards.index, {"fp32": torch.float32, "bf16": torch.bfloat16}[args.precision])
    if adapter:
        raise UserError("--model: it reads continuous ECGs, which `generate` alone does not; name one that reads tokens")
    model.to(device)
    samples = [(shards.ids(i), shards.meta(i), shards.meta(i)["tasks"]) for i in spaced(len(shards), args.ecgs)]
    asked = [(codes, meta, task) for codes, meta, tasks in samples for task in tasks]
    ids = [[*shared_ids(tokenizer, vocabulary, prompts, *one[:2]), *prompt_ids(tokenizer, vocabulary, prompts, *one)] for one in asked]
    masked = list(range(vocabulary.start, model.config.vocab_size))
    wanted = dict(max_new_tokens=args.max_new_tokens, do_sample=False, suppress_tokens=masked, eos_token_id=end_id(tokenizer, prompts),
                  pad_token_id=tokenizer.pad_token_id or 0)  # fmt: skip

    def generate(rows: int) -> list[str]:
        """Longest first, so that those of a batch are about as long."""
        answers = [""] * len(ids)
        order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
        for start in range(0, len(order), rows):
            part = order[start : start + rows]
            width = max(len(ids[i]) for i in part)
            padded = torch.tensor([[0] * (width - len(ids[i])) + ids[i] for i in part], device=device)
            mask = torch.tensor([[0] * (width - len(ids[i])) + [1] * len(ids[i]) for i in part], device=device)
            out = model.generate(padded, attention_mask=mask, **wanted)
            for i, given in zip(part, out[:, width:].tolist()):
                answers[i] = tokenizer.decode(given, skip_special_tokens=True).strip()
        return answers

    def ours() -> list[str]:
        # in the launcher's batches, given back in the order of the questions
        places = spaced(len(shards), args.ecgs)
        known = survey(shards)
        answers: dict[int, list[str]] = {}
        for batch in plan([known[i] for i in places], args.batch):
            given = answer_tasks(model, tokenizer, vocabulary, prompts, [samples[n] for n in batch], args.max_new_tokens, device)
            answers |= {n: [one.prediction for one in some] for n, some in zip(batch, given)}
        return [text for n in range(len(samples)) for text in answers[n]]

    ways = {"ours": ours, "one at a time": lambda: generate(1), f"generate, {args.rows} at a time": lambda: generate(args.rows)}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    given: dict[str, list[str]] = {}
    for round in range(args.rounds + 1):  # the first one warms up
        for name, way in ways.items():
            started = time.perf_counter()
            given[name] = way()
            if device == "cuda":
                torch.cuda.synchronize()
            if round:
                seconds[name].append(time.perf_counter() - started)
                print(f"round {round}: {name}: {len(ids) / seconds[name][-1]:.2f} answers/s", flush=True)
    speeds = {name: len(ids) / median(times) for name, times in seconds.items()}
    differ = {name: sum(one != other for one, other in zip(given["ours"], given[name])) for name in ways if name != "ours"}
    print(f"{len(samples)} ECGs, {len(ids)} tasks, {args.precision}, {device}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}")
    for name, speed in speeds.items():
        beside = "" if name == "ours" else f"   ours {speeds['ours'] / speed:.2f}x   {differ[name]} answers differ"
        print(f"{name:>28}: {speed:8.2f} answers/s{beside}")
    if args.json:
        args.json.write_text(json.dumps({"tasks": len(ids), "answers_per_second": speeds, "differ": differ, "precision": args.precision, "device": device}))
    if args.precision == "fp32" and any(differ.values()):
        sys.exit("the answers are not the same")


if __name__ == "__main__":
    exit_2_on_user_error(main)()
