"""Put questions to a model about one recording, or let it write the report. Research software. Not a medical device; not for diagnosis.

    python -m toolkit.evaluation.ask --model runs/demo/instruct --record runs/demo/data/ptbxl/records500/00000/00001_hr
    python -m toolkit.evaluation.ask --model L --record R --question "Does this ECG show atrial fibrillation?" --choices yes no
    python -m toolkit.evaluation.ask --model L --record ecg.npy --sampling_rate 500 --unit mV --leads I II III aVR aVL aVF V1 V2 V3 V4 V5 V6

Prints the flags of the recording's quality and every answer with its log-likelihood (natural logarithm) and probability: of these very words among all that
the model could say, which is not how likely they are to be true. Draws the ECG. Nothing that it writes names the record, whose path may name a patient.
"""

import argparse
import io
import json
import math
import warnings
from pathlib import Path

import numpy as np
import torch
import transformers

from toolkit.ecg.gains import gains, rounded, zscored
from toolkit.ecg.plot import draw_ecg
from toolkit.ecg.quality import read_checked
from toolkit.ecg.records import RecordError, windows
from toolkit.errors import UserError, exit_2_on_user_error, first_line
from toolkit.evaluation.constrained import answer_constrained
from toolkit.evaluation.generate import answer_tasks
from toolkit.files import whole_file
from toolkit.lm.backbone import STAMP
from toolkit.lm.carried import ecg_tokenizer_of
from toolkit.lm.trained import load_trained
from toolkit.tasks.join import told_age
from toolkit.tokenizer.features import ECGFeatures
from toolkit.tokenizer.tokenizer import ECGTokenizer

BANNER = "Research software. Not a medical device; not for diagnosis."
LONGEST = 128  # tokens of an answer, as launchers/evaluate.py
DEFECTS = {"missing_lead", "flat_lead", "saturated", "amplitude"}  # that sharding.prepare leaves out of what models are trained on, unless told otherwise
SEXES = ("male", "female")
OLDEST = 130  # years
DRAWINGS = (".png", ".svg")


def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    if args.choices and not args.question:
        raise UserError("--choices: are answers to a question; name it with --question")
    for flag, texts in (("--question", args.question), ("--choices", args.choices)):
        if any(not text.strip() for text in texts):
            raise UserError(f"{flag}: one of them is empty")
    if len(set(args.choices)) == 1:
        raise UserError("--choices: one answer is no choice; name two or more")
    if args.age is not None and not 0 <= args.age <= OLDEST:
        raise UserError(f"--age: {args.age:g} is no age in years")
    if args.draw.suffix.lower() not in DRAWINGS:
        raise UserError(f"--draw: {args.draw} has to end with {' or '.join(DRAWINGS)}")
    ecg, flags, notes = read(args.record, args.start, _described(args))
    tokenizer = ecg_tokenizer_of(args.model, args.tokenizer)
    draw(ecg, args.draw)
    answers, more = ask(args.model, tokenizer, ecg, args.question, args.choices, args.age, args.sex)
    said = {"banner": BANNER, "start": args.start, "flags": flags, "notes": notes + more, "answers": answers, "drawing": str(args.draw)}
    print(json.dumps(said, indent=2, ensure_ascii=False) if args.json else "\n".join(lines(said)))


def read(record: str, start: float, array: str) -> tuple[np.ndarray, list[str], list[str]]:
    """The ECG float32 [12, 5000] in mV, its quality flags, and what else is to be said of it. array: as `read_record`.

    Raises UserError naming --record; its text names no path.
    """
    try:
        ecg, flags = read_checked(record, start, array, "flag")
        count = len(windows(record, "all", array))
    except RecordError as error:
        if error.reason == "too_short" and start:
            raise UserError(f"--start: at {start:g} s too little is left of the recording ({error}); leave it out, or name an earlier second") from None
        if error.reason == "absent" and Path(record).exists():
            raise UserError("--record: this is no ECG record; name a WFDB record without its extension, or a .npy or .mat file") from None
        hint = "; name a WFDB record without its extension, or a .npy or .mat file" if error.reason == "absent" else ""
        raise UserError(f"--record: it cannot be used ({error.reason}): {error}{hint}") from None
    except OSError as error:
        raise UserError(f"--record: it cannot be read ({error.strerror})") from None
    notes = [f"the recording is longer than 10 s ({count} windows); this is what begins at {start:g} s (--start)"] if count > 1 else []
    if zscored(gains(ecg)):
        notes.append("every lead has SD 1: the recording was z-scored before, its voltages are lost, and the drawing is in SD")
    if found := sorted(DEFECTS & set(flags)):
        notes.append(f"recordings with {', '.join(found)} are left out when training data are prepared: what the model says of this one was never judged")
    return ecg, flags, notes


def ask(
    model: str | Path, ecg_tokenizer: ECGTokenizer, ecg: np.ndarray, questions: list[str], choices: list[str], age: float | None = None, sex: str = ""
) -> tuple[list[dict], list[str]]:
    """What a model answers to questions on an ECG float32 [12, 5000] mV, or, without any, its report; and what is to be known of it.

    An answer: {"question" (None: the report), "prediction", "loglik", "probability"}, and with choices, which it is then one of, "likelihoods" of all.
    model: a folder as `load_trained` takes it. Raises UserError naming --model.
    """
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # transformers 5.23 of peft 0.21
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    lm, tokenizer, vocabulary, prompts, adapter = load_trained(model, {"tokenizer": ecg_tokenizer.fingerprint()}, dtype)
    lm.to(device)
    meta = {"gains": [rounded(gains(ecg))], "ages": [told_age(age)], "sexes": [sex]}
    if adapter:
        adapter.to(device)
        meta["features"] = ECGFeatures(ecg_tokenizer, adapter.mean, adapter.std).encode(ecg[None])
    tasks = [{"task": "ecgqa", "question_type": "single-verify", "template_id": 0, "question": question} for question in questions]
    tasks = tasks or [{"task": "report", "question_type": "report"}]
    samples, how = [(ecg_tokenizer.encode(ecg[None]), meta, tasks)], (lm, tokenizer, vocabulary, prompts)
    notes = _untuned(json.loads((Path(model) / STAMP).read_text()), bool(questions))
    if (age is not None or sex) and not prompts.background:
        notes.append("age and sex are not used: this model's prompts do not say them (--background of launchers/instruct.py)")
    if choices:
        (given,) = answer_constrained(*how, samples, {0: choices}, device, adapter, top=len(choices))
    else:
        (free,) = answer_tasks(*how, samples, LONGEST, device, adapter)
        given = [{"prediction": one.prediction, "loglik": one.loglik} for one in free]
        if any(one.cut for one in free):
            notes.append(f"an answer did not end within {LONGEST} tokens and is cut; its likelihood is that of these")
    return [{"question": task.get("question"), "probability": math.exp(one["loglik"]), **one} for task, one in zip(tasks, given, strict=True)], notes


def draw(ecg: np.ndarray, path: Path) -> None:
    """The ECG [12, 5000] mV on paper, under the banner. Raises UserError naming --draw."""
    page = io.BytesIO()
    try:
        draw_ecg(ecg, page, title=BANNER, unit="SD" if zscored(gains(ecg)) else "mV", format=path.suffix.lower().lstrip("."))
        with whole_file(path) as file:
            file.write(page.getvalue())
    except ValueError as error:
        raise UserError(f"--draw: {first_line(error)}") from None
    except OSError as error:
        raise UserError(f"--draw: {path} cannot be written ({error.strerror})") from None


def lines(said: dict) -> list[str]:
    """What is printed for people."""
    found = [said["banner"], f"quality flags: {', '.join(said['flags']) or 'none'}", *(f"note: {note}" for note in said["notes"])]
    for answer in said["answers"]:
        found += ["", f"Question: {answer['question']}" if answer["question"] else "Report:"]
        each = answer.get("likelihoods") or {answer["prediction"]: answer["loglik"]}
        width = max(map(len, each))
        for text, loglik in each.items():
            figures = f"log-likelihood {loglik:.3f}   probability {math.exp(loglik):.3g}"
            found += [f"  {text or '(empty)':<{width}}   {figures}"] if answer["question"] else [f"  {text or '(empty)'}", f"  {figures}"]
    return [*found, "", f"drawing: {said['drawing']}"]


def _untuned(stamp: dict, questions: bool) -> list[str]:
    """What a model's stamp says of answers it never learnt to give."""
    what = "questions" if questions else "reports"
    if "prompts" not in stamp and "gain_text" not in stamp:
        return [f"this model was never tuned on questions or reports (launchers/instruct.py): what it says of {what} means nothing"]
    known = stamp.get("tuned_on")  # older stamps do not say
    if known is not None and not [kind for kind in known if (kind != "report") == questions]:
        return [f"this model was never tuned on {what}, but on {', '.join(known)}: what it says here means nothing"]
    return []


def _described(args) -> str:
    """A bare array's description, as `bare_arrays.open_array` takes it; '' of a WFDB record, which says these things itself."""
    path, given = Path(args.record), (args.sampling_rate, args.unit, args.leads)
    if path.suffix == ".npy" or (path.suffix == ".mat" and not path.with_suffix(".hea").exists()):
        if None in given:
            raise UserError("--record: a bare array does not say what it holds; add --sampling_rate 500 --unit mV --leads I II III ..., in its order")
        return json.dumps(dict(zip(("sampling_rate", "unit", "leads"), given)))
    if any(given):
        raise UserError("--sampling_rate, --unit, --leads: describe a bare array, .npy or .mat; a WFDB record says them itself, leave them out")
    return ""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m toolkit.evaluation.ask", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of launchers/instruct.py (an adapter) or `python -m toolkit.lm.merge` (a model)")
    parser.add_argument("--record", required=True, help="WFDB record without its extension; or a bare array, .npy or .mat, that the next three describe")
    parser.add_argument("--sampling_rate", type=float, metavar="HZ", help="of a bare array")
    parser.add_argument("--unit", help="of a bare array: V, mV, uV or nV")
    parser.add_argument("--leads", nargs="+", metavar="LEAD", help="of a bare array, in its order: I II III aVR ...")
    parser.add_argument("--start", type=float, default=0.0, metavar="SECONDS", help="where the 10 s begin in a longer recording (default: 0)")
    parser.add_argument("--question", nargs="+", default=[], metavar="TEXT", help="questions, each in quotes; without any the model writes the report")
    parser.add_argument("--choices", nargs="+", default=[], metavar="ANSWER", help="the answer is the likeliest of these; shows how likely each is")
    parser.add_argument("--age", type=float, metavar="YEARS", help="of the patient, for a model tuned with --background")
    parser.add_argument("--sex", choices=SEXES, default="", help="of the patient, for a model tuned with --background")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="the ECG tokenizer of the model's codes (default: the ecg_tokenizer/ that the model carries)")
    parser.add_argument(
        "--draw", type=Path, default=Path("ecg.png"), metavar="FILE", help="drawing of the ECG, .png or .svg; replaced if it is there (default: ecg.png, here)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON: banner, start, flags, notes, answers, drawing")
    return parser


if __name__ == "__main__":
    exit_2_on_user_error(main)()
