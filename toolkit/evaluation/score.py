"""Score a file of predictions, of this toolkit or of another system: questions, reports or both.

python -m toolkit.evaluation.score --predictions runs/demo/evaluate/predictions.jsonl
python -m toolkit.evaluation.score --predictions P.jsonl --classes ecgqa/ptbxl/answers_for_each_template.csv --json > scores.json
python -m toolkit.evaluation.score --predictions P.jsonl --compat heartllm      # the arithmetic of the authors' release

A row is a JSON object on a line of its own (or an element of one JSON list) and needs `prediction` and `reference` (else `answer` or `gt`, as in the authors'
files): text, or a list of answers. Several answers in one text are joined by "; ", as in "atrial fibrillation; left axis deviation", in any order. These
help: id, question_type, template_id, attribute_type, task ("ecgqa" or "report"), patient (any number or name: it is compared, never shown) with source, and
controls, the answers of other systems or of this one without the ECG, {"majority": "yes", "shuffled": "no"}. An empty prediction counts as wrong and is
never dropped.
Intervals are 95 %, by bootstrap over patients. Research software: a score says nothing about use on patients.
"""

import argparse
import json

from toolkit.errors import exit_2_on_user_error
from toolkit.evaluation.heartllm import heartllm_compat
from toolkit.evaluation.metrics import read_classes
from toolkit.evaluation.predictions import read_predictions
from toolkit.evaluation.table import table, text_table


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m toolkit.evaluation.score", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--predictions", required=True, help="file of predictions: JSON lines, or a JSON list")
    parser.add_argument("--classes", help="ECG-QA's answers_for_each_template.csv: gives the share of answers that a template does not have")
    parser.add_argument("--compat", choices=["heartllm"], help="heartllm: the scores as the authors' release computes them, instead of the table")
    parser.add_argument("--json", action="store_true", help="print JSON: the table with all lines and the conventions of every score")
    args = parser.parse_args(argv)
    rows = read_predictions(args.predictions)
    classes = read_classes(args.classes) if args.classes else None
    scores = heartllm_compat(rows) if args.compat else table(rows, classes)
    if args.json:
        print(json.dumps(scores, indent=2, ensure_ascii=False, allow_nan=False))
    else:
        print(compat_text(scores) if args.compat else text_table(scores))


def compat_text(scores: dict) -> str:
    """What `heartllm_compat` gives, in percent, for a terminal."""
    lines = ["As the HeartLLM release computes it; other scores of this toolkit are not comparable with these."]
    for kind, judged in scores["questions"].items():
        own = f"; with the answers split where this toolkit joins them {100 * judged['exact_match_own_separator']:.1f}"
        lines.append(f"{kind:<34}{judged['n']:>7,}  exact match {100 * judged['exact_match']:.1f}{own}")
    for name, value in (scores["reports"] or {"n": 0}).items():
        if name != "n":
            lines.append(f"{name:<34}{scores['reports']['n']:>7,}  {'-' if value is None else f'{100 * value:.1f}'}")
    return "\n".join(lines + scores["notes"])


if __name__ == "__main__":
    exit_2_on_user_error(main)()
