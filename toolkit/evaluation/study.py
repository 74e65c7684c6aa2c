"""A blinded rating of reports by clinicians: make the page, and score what they export.

python -m toolkit.evaluation.study make --predictions runs/demo/evaluate/predictions.jsonl --shards runs/demo/tasks --out runs/demo/study
python -m toolkit.evaluation.study score --study runs/demo/study --exports anna.json ben.json

make writes study.html, to give to the raters, and key.json, to keep: only the key says which text is whose. The page is one file without any network: it
shows the reference and each system's report in random order, asks for accuracy, completeness and actionability from 1 to 5, keeps the progress in the
browser, and exports a file to send back. score reads these: means and differences to the reference with 95 % intervals over cases, agreement between raters,
and how each automatic score goes with the ratings. For research: what raters prefer here says nothing on what is safe in use.
"""

import argparse
import base64
import hashlib
import io
import json
import os
import random
import re
import secrets
from collections import Counter
from pathlib import Path

import jinja2
import numpy as np
from markupsafe import Markup

from toolkit.ecg.gains import gains, zscored
from toolkit.ecg.plot import draw_ecg
from toolkit.ecg.quality import read_checked
from toolkit.ecg.records import RecordError
from toolkit.errors import UserError, exit_2_on_user_error
from toolkit.evaluation import agreement
from toolkit.evaluation.cards import recordings_of
from toolkit.evaluation.findings import finding_scores
from toolkit.evaluation.metrics import report_scores
from toolkit.evaluation.predictions import read_predictions, units
from toolkit.files import new_folder, write_text
from toolkit.shards.reader import Shards

FORMAT = "heartspeed study 1"
PAGE, KEY = "study.html", "key.json"
REFERENCE = "reference"
CRITERIA = (  # name, label, question, what 1 and 5 mean
    ("accuracy", "Accuracy", "Is what it says what the ECG shows?", "wrong", "right"),
    ("completeness", "Completeness", "Is all there that matters?", "much is missing", "complete"),
    ("actionability", "Actionability", "Could a colleague act on it?", "not at all", "at once"),
)
NAMES = tuple(name for name, *_ in CRITERIA)
MANY = 24  # reports of one case, A to X


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m toolkit.evaluation.study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    new = commands.add_parser("make", help="write the rating page and its key")
    new.add_argument("--predictions", required=True, type=Path, help="predictions.jsonl of launchers/evaluate.py, or another system's; its reports are rated")
    new.add_argument("--other", type=Path, nargs="+", default=[], help="predictions of other systems for the same references, matched by id")
    new.add_argument("--out", required=True, type=Path, help="a new folder, for study.html and key.json")
    new.add_argument("--cases", type=int, default=50, help="how many reports, of as many patients, drawn by chance (default 50)")
    new.add_argument(
        "--seed", type=int, help="of draw and orders, so part of the key: who knows it knows whose the texts are (default: drawn by chance, kept in key.json)"
    )
    new.add_argument("--shards", help="task shards that the predictions were made from: draws each case's 12-lead ECG, from its recording")
    new.add_argument("--split", default="test", choices=("train", "valid", "test"), help="split of --shards that was judged (default test)")
    judged = commands.add_parser("score", help="read the raters' exports")
    judged.add_argument("--study", required=True, type=Path, help="folder that `make` wrote")
    judged.add_argument("--exports", required=True, type=Path, nargs="+", help="files that raters exported, one of each")
    judged.add_argument("--json", action="store_true", help="print JSON instead of tables")
    args = parser.parse_args(argv)
    if args.command == "make":
        cases = make(args)
        print(f"{cases} cases: give {args.out / PAGE} to the raters and keep {args.out / KEY} from them")
    else:
        scores = score(read_key(args.study), args.exports)
        print(json.dumps(scores, indent=2) if args.json else "\n".join(table(scores)))


def make(args: argparse.Namespace) -> int:
    """Write the study; the number of its cases. Raises UserError naming the flag."""
    if args.cases < 1:
        raise UserError("--cases: at least 1")
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise UserError(f"--out: {args.out} is not empty, and the key of a study that was begun must not be lost; name a new folder")
    paths = [args.predictions, *args.other]
    if len({path.resolve() for path in paths}) < len(paths) or len(paths) >= MANY:
        raise UserError(f"--other: every file once, and fewer than {MANY} in all")
    systems = [reports_of(path, flag) for path, flag in zip(paths, ["--predictions", *["--other"] * len(args.other)])]
    seed = secrets.randbits(128) if args.seed is None else args.seed  # a default that stands in this file would tell every rater the orders
    chosen = choose(systems, paths, args.cases, seed)
    shuffle, cases = random.Random(f"order {seed}"), []
    for id in chosen:
        texts = [[0, systems[0][id]["reference"]], *([i, system[id]["prediction"]] for i, system in enumerate(systems, 1))]
        shuffle.shuffle(texts)
        cases.append({"id": id, "texts": texts})
    pictures = draw([systems[0][id] for id in chosen], args.shards, args.split) if args.shards else [None] * len(cases)
    shown = [{"png": png, "texts": [text for _, text in case["texts"]]} for png, case in zip(pictures, cases)]
    study = hashlib.sha256(json.dumps(shown).encode()).hexdigest()[:16]  # of what raters see, not of the key
    with new_folder(args.out) as folder:
        write_text(folder / PAGE, page(study, shown))
        key = {"format": FORMAT, "study": study, "seed": seed, "sources": [REFERENCE, *short_names(paths)], "cases": cases}
        write_text(folder / KEY, json.dumps(key, indent=1, ensure_ascii=False))
    return len(cases)


def short_names(paths: list[Path]) -> list[str]:
    """The end of each path that no other has: key.json is handed on with results, and where a person's files lie is nobody's business."""
    ends = [["/".join(parts[-n:]) for n in range(1, len(parts) + 1)] for parts in (Path(os.path.abspath(path)).parts for path in paths)]
    taken = Counter(end for some in ends for end in some)
    return [next(end for end in some if taken[end] == 1 and end != REFERENCE) for some in ends]


def reports_of(path: Path, flag: str) -> dict[str, dict]:
    """The report rows of a file of predictions, by id."""
    rows = {row["id"]: row for row in read_predictions(path, flag) if row["task"] == "report"}
    if not rows:
        raise UserError(f"{flag}: {path} holds no reports, and questions are not rated")
    return rows


def choose(systems: list[dict[str, dict]], paths: list[Path], count: int, seed: int) -> list[str]:
    """Ids of reports that every system has, in random order, one of a patient (of an ECG where patients are not known): intervals are over cases."""
    shared = sorted(set.intersection(*map(set, systems)))
    if not shared:
        raise UserError("--other: no id of a report is in all files; make the predictions from the same tasks")
    for system, path in zip(systems[1:], paths[1:]):
        for id in shared:
            if system[id]["reference"].split() != systems[0][id]["reference"].split():
                raise UserError(f"--other: {path} has another reference than {paths[0]} for id {id!r}; make the predictions from the same tasks")
    patients = units([systems[0][id] for id in shared])[0]
    order = list(zip(shared, patients))
    random.Random(f"cases {seed}").shuffle(order)
    first: dict[int, str] = {}
    for id, patient in order:
        first.setdefault(patient, id)
    return list(first.values())[:count]


def draw(rows: list[dict], folder: str, split: str) -> list[str]:
    """The ECG of each row as a PNG in base64, without a name on it. A reconstruction will not do: raters would judge the tokenizer's ECG, not the patient's."""
    shards, pictures = Shards.open(folder, split, kind="tasks"), []
    recordings = recordings_of(shards)
    for row in rows:
        i = row.get("sample", -1)
        if not 0 <= i < len(shards) or row["id"] not in {task["id"] for task in shards.meta(i)["tasks"]}:
            raise UserError(f"--shards: id {row['id']!r} is not in sample {i} of its split {split!r}; name the shards and --split that the predictions are of")
        meta, picture = shards.meta(i), io.BytesIO()
        try:
            ecg = read_checked(*recordings[meta["source"], meta["record_ids"][0]], "flag")[0]
        except (KeyError, RecordError):
            raise UserError(f"--shards: the recording of sample {i} is not at hand; bring the manifest and its data, or leave --shards out") from None
        draw_ecg(ecg, picture, unit="SD" if zscored(gains(ecg)) else "mV")
        pictures.append(base64.b64encode(picture.getvalue()).decode())
    return pictures


def page(study: str, cases: list[dict]) -> str:
    """The rating page. cases: {"png": base64 or None, "texts": [str]} in the order shown."""
    criteria = [dict(zip(("name", "label", "question", "low", "high"), criterion)) for criterion in CRITERIA]
    data = json.dumps({"format": FORMAT, "study": study, "criteria": criteria, "cases": cases}).replace("<", "\\u003c")
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.get_template("study.html.j2")
    script = re.search(r"<script>(.*)</script>", environment.loader.get_source(environment, template.name)[0], re.DOTALL)[1]
    script_hash = "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()  # the only script that the page may run
    return template.render(study=study, data=Markup(data), drawn=cases[0]["png"] is not None, script_hash=Markup(script_hash))


def read_key(folder: Path) -> dict:
    """key.json of a study. Raises UserError naming --study."""
    try:
        key = json.loads((folder / KEY).read_text(encoding="utf-8"))
        if key["format"] != FORMAT:
            raise UserError(f"--study: {folder / KEY} has format {key['format']!r}, this program reads {FORMAT!r}")
        return key
    except OSError as error:
        raise UserError(f"--study: {folder / KEY} cannot be read: {error.strerror}; name the folder that `make` wrote") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"--study: {folder / KEY} is no key of a study; name the folder that `make` wrote") from error


def read_exports(key: dict, paths: list[Path]) -> np.ndarray:
    """What the raters gave, nan where nothing: float64 [raters, cases, sources, criteria]. Raises UserError naming --exports and the file."""
    ratings = np.full((len(paths), len(key["cases"]), len(key["sources"]), len(NAMES)), np.nan)
    raters: dict[str, Path] = {}
    for i, path in enumerate(paths):
        try:
            rater = _fill(ratings[i], json.loads(path.read_text(encoding="utf-8")), key)
        except OSError as error:
            raise UserError(f"--exports: {path} cannot be read: {error.strerror}") from error
        except UserError as error:
            raise UserError(f"--exports: {path}: {error}") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"--exports: {path} is not a file that the rating page exports ({type(error).__name__}: {error})") from error
        if rater in raters:
            raise UserError(f"--exports: {raters[rater]} and {path} are both of rater {rater!r}; give the later one, or tell two people apart by name")
        raters[rater] = path
    if np.isnan(ratings).all():
        raise UserError("--exports: no text is rated in any of these files")
    return ratings


def _fill(ratings: np.ndarray, export: dict, key: dict) -> str:
    """Put one export into ratings [cases, sources, criteria]; the rater. Raises UserError saying what is wrong in it."""
    if export["format"] != FORMAT or export["study"] != key["study"]:
        raise UserError(f"it is of study {export['study']!r}, --study is {key['study']!r}")
    if not isinstance(export["rater"], str) or not export["rater"].strip():
        raise UserError("it names no rater")
    seen = set()
    for given in export["ratings"]:
        case, letter = given["case"], given["text"]
        if type(case) is not int or not 1 <= case <= len(key["cases"]):
            raise UserError(f"case {case!r} is not in the study, which has {len(key['cases'])}")
        texts = {chr(ord("A") + i): source for i, (source, _) in enumerate(key["cases"][case - 1]["texts"])}
        if letter not in texts:
            raise UserError(f"case {case} has no text {letter!r}")
        if (case, letter) in seen:
            raise UserError(f"case {case}, text {letter} is rated twice")
        seen.add((case, letter))
        for i, name in enumerate(NAMES):
            if given[name] is not None:
                if type(given[name]) is not int or not 1 <= given[name] <= agreement.LEVELS:
                    raise UserError(f"case {case}, text {letter}: {name} is 1 to {agreement.LEVELS}; got {given[name]!r}")
                ratings[case - 1, texts[letter], i] = given[name]
    return export["rater"].strip().casefold()


def score(key: dict, exports: list[Path]) -> dict:
    """What the ratings say, each figure with its 95 % interval over cases; None where it is undefined.

    {"study", "cases", "raters", "rated": texts that anybody rated,
     "means": {source: {criterion: {"value", "low", "high", "n"}}}: the mean over cases of the mean over raters,
     "differences": {source: {criterion: ...}}: to the reference, case by case,
     "agreement": {criterion: {"alpha": ..., "kappa": ... of two raters}}: of all texts that at least two rated,
     "correlations": {score: {criterion: ...}}: Spearman's rank correlation of an automatic score of a system's report with the mean of its ratings}.
    """
    ratings = read_exports(key, exports)
    given = np.isfinite(ratings).sum(0)
    each = np.where(given > 0, np.nansum(ratings, 0) / np.maximum(given, 1), np.nan)  # [cases, sources, criteria]
    systems = list(enumerate(key["sources"]))[1:]
    automatic = automatic_scores(key)
    return {
        "study": key["study"],
        "cases": len(key["cases"]),
        "raters": len(exports),
        "rated": int((given > 0).any(-1).sum()),
        "means": {source: {name: agreement.mean(each[:, i, c]) for c, name in enumerate(NAMES)} for i, source in enumerate(key["sources"])},
        "differences": {source: {name: agreement.mean(each[:, i, c] - each[:, 0, c]) for c, name in enumerate(NAMES)} for i, source in systems},
        "agreement": {name: agreement.between(ratings[..., c]) for c, name in enumerate(NAMES)},
        "correlations": {metric: {name: agreement.correlation(values, each[:, 1:, c]) for c, name in enumerate(NAMES)} for metric, values in automatic.items()},
    }


def automatic_scores(key: dict) -> dict[str, np.ndarray]:
    """Each automatic score of each system's report by itself, nan where it is of nothing: name -> float64 [cases, systems]. Single findings are left out."""
    found: dict[str, np.ndarray] = {}
    shape = len(key["cases"]), len(key["sources"]) - 1
    for i, case in enumerate(key["cases"]):
        reference, *predictions = (text for _, text in sorted(case["texts"]))
        row = {"id": case["id"], "task": "report", "question_type": "report", "reference": reference}
        for j, prediction in enumerate(predictions):
            row["prediction"] = prediction
            for one in (*report_scores([row], [prediction]), *finding_scores([row], [prediction])):
                if ":" not in one.name:
                    found.setdefault(one.name, np.full(shape, np.nan))[i, j] = one.all()
    return found


def table(scores: dict) -> list[str]:
    """The lines that a person reads."""
    width = max(16, *(len(name) for part in ("means", "correlations") for name in scores[part])) + 2

    def part(title: str, rows: dict[str, dict]) -> list[str]:
        head = f"{title:<{width}}" + "".join(f"{label:>24}" for _, label, *_ in CRITERIA)
        return ["", head, *(f"{name:<{width}}" + "".join(f"{_shown(row[criterion]):>24}" for criterion in NAMES) for name, row in rows.items())]

    agree = {what: {name: scores["agreement"][name][what] for name in NAMES} for what in next(iter(scores["agreement"].values()))}
    return [
        f"{scores['cases']} cases, {scores['raters']} raters, {scores['rated']} texts rated; 95 % intervals over cases; ratings 1 to {agreement.LEVELS}",
        *part("Mean", scores["means"]),
        *part("To the reference", scores["differences"]),
        *part("Between raters", agree),
        *part("Rank correlation", scores["correlations"]),
        "",
        "alpha: Krippendorff's, ordinal; kappa: weighted, quadratic, of two raters. Rank correlation: Spearman's, of a system's texts, not the reference's;",
        "f1, f1_macro, precision and recall are of clinical findings. Several systems are pooled: differences between them are in it.",
        "Research software. Not a medical device; not for diagnosis.",
    ]


def _shown(figure: dict) -> str:
    value, low, high = (None if figure[name] is None else f"{round(figure[name], 2) + 0.0:.2f}" for name in ("value", "low", "high"))  # no -0.00
    return "-" if value is None else value if low is None else f"{value} ({low} to {high})"


if __name__ == "__main__":
    exit_2_on_user_error(main)()
