"""Write a synthetic PTB-XL and ECG-QA: `python -m toolkit.ecg.synthetic --out runs/demo/data --records 2400 --seed 0`

Small variant, a few seconds: `python -m toolkit.ecg.synthetic --out runs/tiny --records 200 --workers 1`

A synthetic teaching corpus, not medical data: it exists so that every step of the project can be tried, and its result judged,
without a download. The signals come from `toolkit.ecg.heart`; every word (codes, report, questions) follows from the same
parameters. OUT then holds what the real downloads hold:

    OUT/ptbxl/ptbxl_database.csv, scp_statements.csv           columns of PTB-XL 1.0.3
    OUT/ptbxl/records500/00000/00001_hr.{hea,dat}              WFDB format 16, 1000 steps a mV (records100 is not written)
    OUT/ecgqa/{train,valid,test}/00000.json, ...               rows of ECG-QA 1.0.2, at most 10,000 a file; folds 1-8, 9, 10
    OUT/ecgqa/answers_for_each_template.csv
    OUT/corpus.json                                            the arguments; written last: its presence means complete

Same --records and --seed give the same bytes, whatever --workers. More records keep the earlier ones and their questions.
"""

import argparse
import csv
import datetime
import functools
import io
import itertools
import json
import multiprocessing
import os
from pathlib import Path

import numpy as np
from tqdm import tqdm

from toolkit.ecg.heart import Heart, draw, simulate
from toolkit.ecg.leads import LEADS, SAMPLING_RATE
from toolkit.errors import UserError, exit_2_on_user_error
from toolkit.files import new_folder

VERSION = 1  # of the generator: raise it when the same arguments would give other bytes
ECGS_PER_PATIENT = 1.15  # PTB-XL: 21,799 / 18,869 (1.0.3)
ROWS_PER_FILE = 10_000  # ECG-QA 1.0.2
GAIN = 1000  # steps a mV, PTB-XL
SPLITS = {**dict.fromkeys(range(1, 9), "train"), 9: "valid", 10: "test"}

# Label of the heart -> (SCP code, ECG-QA's words for it, the report's words). In PTB-XL diagnostic codes carry a likelihood,
# form and rhythm codes 0.
RHYTHM = {
    "sinus": ("SR", "sinus rhythm"), "bradycardia": ("SBRAD", "sinus bradycardia"), "tachycardia": ("STACH", "sinus tachycardia"),
    "arrhythmia": ("SARRH", "sinus arrhythmia"), "fibrillation": ("AFIB", "atrial fibrillation"), "flutter": ("AFLT", "atrial flutter"),
    "paced": ("PACE", "normal functioning artificial pacemaker"),
}  # fmt: skip
CONDUCTION = {
    "first_degree": ("1AVB", "first degree av block", "first degree av block"),
    "lbbb": ("CLBBB", "complete left bundle branch block", "left bundle branch block"),
    "rbbb": ("CRBBB", "complete right bundle branch block", "right bundle branch block"),
}
MORPHOLOGY = {
    "lvh": ("LVH", "left ventricular hypertrophy", "left ventricular hypertrophy with strain"),
    "anterior_mi": ("AMI", "myocardial infarction in anterior leads", "acute anterior infarction"),
    "inferior_mi": ("IMI", "myocardial infarction in inferior leads", "acute inferior infarction"),
    "low_voltage": ("LVOLT", "low qrs voltages in the frontal and horizontal leads", "low voltage"),
    "t_inversion": ("INVT", "inverted t-waves", "t wave inversion"),
}
ECTOPY = {
    "ventricular": ("PVC", "ventricular premature complex", "ventricular extrasystole", "VES"),
    "atrial": ("PAC", "atrial premature complex", "supraventricular extrasystole", "SVES"),
}
AXIS = {"normal": ("MID", "normal heart axis"), "left": ("LAD", "left axis deviation"), "right": ("RAD", "right axis deviation")}
FORM = ("LVOLT", "INVT", "PVC", "PAC")

# Rows of PTB-XL's scp_statements.csv: code, description, kind, class, subclass, category (CATEGORIES), statement.
CATEGORIES = {
    "QRS": "Other QRS morphology descriptive statements",
    "AV": "Sinus node dysfunction, atrial and AV-conduction defects",
    "IV": "Intraventricular and intra-atrial Conduction disturbances",
    "ectopic": "Statements related to ectopic rhythm abnormalities",
    "impulse": "Statements related to impulse formation (abnormalities)",
}
STATEMENTS = """NORM|normal ECG|diagnostic|NORM|NORM|Normal/abnormal|normal ECG
LVH|left ventricular hypertrophy|diagnostic|HYP|LVH|Ventricular Hypertrophy|left ventricular hypertrophy
AMI|anterior myocardial infarction|diagnostic|MI|AMI|Myocardial Infarction|anterior myocardial infarction
IMI|inferior myocardial infarction|diagnostic|MI|IMI|Myocardial Infarction|inferior myocardial infarction
1AVB|first degree AV block|diagnostic|CD|_AVB|AV|first degree AV block
CLBBB|complete left bundle branch block|diagnostic|CD|CLBBB|IV|(complete) left bundle branch block
CRBBB|complete right bundle branch block|diagnostic|CD|CRBBB|IV|(complete) right bundle branch block
LVOLT|low QRS voltages in the frontal and horizontal leads|form|||QRS|low QRS voltages in the frontal and horizontal leads
INVT|inverted T-waves|form|||other ST-T descriptive statements|inverted T-waves
PVC|ventricular premature complex|form|||ectopic|ventricular premature complex (beat)
PAC|atrial premature complex|form|||ectopic|atrial premature complex (beat)
SR|sinus rhythm|rhythm|||impulse|sinus rhythm
SBRAD|sinus bradycardia|rhythm|||impulse|sinus bradycardia
STACH|sinus tachycardia|rhythm|||impulse|sinus tachycardia
SARRH|sinus arrhythmia|rhythm|||impulse|sinus arrhythmia
AFIB|atrial fibrillation|rhythm|||impulse|atrial fibrillation
AFLT|atrial flutter|rhythm|||impulse|atrial flutter
PACE|normal functioning artificial pacemaker|rhythm|||Pacemaker types and pacemaker function|normal functioning artificial pacemaker
"""


# --- words of a heart -------------------------------------------------------------------------------------------------


def scp_codes(heart: Heart) -> dict[str, float]:
    """SCP codes with PTB-XL's likelihoods, diagnostic codes first, the rhythm last."""
    codes = ["NORM"] if heart.is_normal else []
    codes += [table[label][0] for table, label in _findings(heart) if label in table]
    codes.append(RHYTHM[heart.rhythm][0])
    # The findings stand in the order conduction, morphology, ectopy; form codes go behind the diagnostic ones.
    rhythm = codes.pop()
    form = [code for code in codes if code in FORM]
    return {**{code: 100.0 for code in codes if code not in form}, **dict.fromkeys([*form, rhythm], 0.0)}


def _findings(heart: Heart):
    return (CONDUCTION, heart.conduction), (MORPHOLOGY, heart.morphology), (ECTOPY, heart.ectopy)


def report(heart: Heart) -> str:
    """Report in PTB-XL's manner: rhythm, axis, conduction, morphology, extrasystoles, verdict; always in this order."""
    said = ["pacemaker rhythm" if heart.rhythm == "paced" else RHYTHM[heart.rhythm][1]]
    if heart.rhythm != "paced":  # where the pacemaker decides it, the axis says nothing about the heart
        said.append({"normal": "normal axis", "left": "left axis type", "right": "right axis type"}[heart.axis])
    said += [table[label][2] for table, label in _findings(heart)[:2] if label in table]
    if heart.ectopics:
        said.append(f"{heart.ectopics} {ECTOPY[heart.ectopy][2]}{'s' * (heart.ectopics > 1)}")
    if heart.is_normal:
        said.append("normal ecg")
    return ". ".join(said) + "."


def facts(heart: Heart) -> dict[str, tuple[str, ...]]:
    """What is true of the record in ECG-QA's words, by family; () is answered "none". No `axis` where paced."""
    normal = ("normal ecg",) if heart.is_normal else ()
    conduction = tuple(CONDUCTION[c][1] for c in CONDUCTION if c == heart.conduction)
    structure = tuple(row[1] for label, row in MORPHOLOGY.items() if label == heart.morphology)
    beats = tuple(row[1] for label, row in ECTOPY.items() if label == heart.ectopy)
    shape = tuple(w for w in structure if MORPHOLOGY[heart.morphology][0] in FORM)
    return {
        "diagnostic": normal + conduction + tuple(w for w in structure if w not in shape),
        "form": shape + beats,
        "rhythm": (RHYTHM[heart.rhythm][1],),
        **({} if heart.rhythm == "paced" else {"axis": (AXIS[heart.axis][1],)}),
        "systole": tuple(row[2] + "s" for label, row in ECTOPY.items() if label == heart.ectopy),
        "conduction": conduction,
    }


# --- questions --------------------------------------------------------------------------------------------------------

_RHYTHMS = tuple(row[1] for row in RHYTHM.values())
_DIAGNOSES = tuple(row[1] for row in (*CONDUCTION.values(), *MORPHOLOGY.values()) if row[0] not in FORM)
_FORMS = tuple(row[1] for row in (*MORPHOLOGY.values(), *ECTOPY.values()) if row[0] in FORM)
_AXES = tuple(row[1] for row in AXIS.values())
_SYSTOLES = tuple(row[2] + "s" for row in ECTOPY.values())
_CONDUCTIONS = tuple(row[1] for row in CONDUCTION.values())
_SYMPTOMS = "Does this ECG show symptoms of {}?"

# (template_id, type, attribute_type, family, words asked about, wording). Ids to 70 and their wordings are ECG-QA's; 71 has no
# counterpart there. A verify or choose template makes one question for each word or pair.
TEMPLATES = (
    (1, "verify", "scp_code", "diagnostic", _DIAGNOSES, _SYMPTOMS),
    (1, "verify", "scp_code", "form", _FORMS, _SYMPTOMS),
    (1, "verify", "scp_code", "rhythm", _RHYTHMS, _SYMPTOMS),
    (20, "verify", "heart_axis", "axis", _AXES, "Does this ECG show {}?"),
    (36, "verify", "extra_systole", "systole", _SYSTOLES, "Does this ECG show {}?"),
    (8, "choose", "scp_code", "diagnostic", _DIAGNOSES, "Which diagnostic symptom does this ECG show, {} or {}?"),
    (10, "choose", "scp_code", "rhythm", _RHYTHMS, "Which rhythm-related symptom does this ECG show, {} or {}?"),
    (11, "choose", "scp_code", "form", _FORMS, "Which form-related symptom does this ECG show, {} or {}?"),
    (21, "choose", "heart_axis", "axis", _AXES, "Which cardiac axis does this ECG show, {} or {}?"),
    (37, "choose", "extra_systole", "systole", _SYSTOLES, "Which kind of extra systoles does this ECG show, {} or {}?"),
    (4, "query", "scp_code", "diagnostic", ("normal ecg", *_DIAGNOSES), "What diagnostic symptoms does this ECG show?"),
    (6, "query", "scp_code", "form", _FORMS, "What form-related symptoms does this ECG show?"),
    (7, "query", "scp_code", "rhythm", _RHYTHMS, "What rhythm-related symptoms does this ECG show?"),
    (22, "query", "heart_axis", "axis", _AXES, "What direction is this ECG deviated to?"),
    (38, "query", "extra_systole", "systole", _SYSTOLES, "What kind of extra systole does this ECG show?"),
    (71, "query", "scp_code", "conduction", _CONDUCTIONS, "What conduction disorder does this ECG show?"),
)
# Questions an ECG, on average: 4 verify, 3 choose, 3 query. The share of each query template keeps it answerable by few alike.
PER_ECG = {"verify": 4.0, "choose": 3.0, "query": 3.0}
# Weight of an outcome among a question's rows. Choose: A 1, B 1, none .75, both .35 at most, so that the commonest answer of a pair
# stays near 36 %. Query: a common answer weighs no more than a rare one.
CHOOSE_WEIGHT = {"none": 0.75, "both": 0.35}
SURVEY = 4000  # hearts drawn to learn how often each outcome occurs: 2-3 % relative error for a condition of 10 %
MOST = 0.85  # a question is asked of at most this share of the records with its rarest outcome


def _questions() -> list[tuple]:
    """Every question: (template row, words asked about, question_id), in fixed order."""
    made, count = [], {}
    for row in TEMPLATES:
        words = {"verify": itertools.combinations(row[4], 1), "choose": itertools.combinations(row[4], 2), "query": [row[4]]}[row[1]]
        for group in words:
            count[row[0]] = count.get(row[0], -1) + 1
            made.append((row, group, 100 * row[0] + count[row[0]]))
    return made


QUESTIONS = _questions()


def answer(kind: str, group: tuple[str, ...], true: tuple[str, ...]) -> tuple[str, ...]:
    """ECG-QA's answer to a question about `group` where `true` holds."""
    if kind == "verify":
        return ("yes",) if group[0] in true else ("no",)
    return tuple(sorted(word for word in group if word in true)) or ("none",)


def _weight(kind: str, given: tuple[str, ...]) -> float:
    if kind != "choose":
        return 1.0
    return CHOOSE_WEIGHT["none"] if given == ("none",) else CHOOSE_WEIGHT["both"] if len(given) == 2 else 1.0


@functools.cache
def asking_rates() -> list[dict[tuple[str, ...], float]]:
    """Chance that a question is put to a record, by the answer it would have: what balances the answers by construction.

    An outcome of frequency f and weight w is asked of `rate * w / f` of its records, at most MOST; `rate` is solved for each type
    of question so that PER_ECG questions an ECG come out. The frequencies are those of `draw`, so no record depends on another.
    """
    rng = np.random.default_rng(20240411)  # its own stream: the table is the same for every corpus
    known = [facts(draw(rng)) for _ in range(SURVEY)]
    frequency: list[dict[tuple[str, ...], float]] = []
    for (_, kind, _, family, _, _), group, _ in QUESTIONS:
        seen: dict[tuple[str, ...], float] = {}
        for true in known:
            if family in true:
                given = answer(kind, group, true[family])
                seen[given] = seen.get(given, 0) + 1 / SURVEY
        frequency.append(seen)

    def rates(i: int, kind: str, rate: float) -> dict[tuple[str, ...], float]:
        seen = frequency[i]
        # A and B, or yes and no, must stay equal: the rarer of the two decides for both. "none" and "both" yield alone.
        pair = [f for given, f in seen.items() if _weight(kind, given) == 1.0]
        cap = MOST * min(pair) if kind != "query" else np.inf
        return {given: min(MOST, min(rate, cap) * _weight(kind, given) / f) for given, f in seen.items()}

    table: list[dict[tuple[str, ...], float]] = [{}] * len(QUESTIONS)
    for kind, wanted in PER_ECG.items():
        mine = [i for i, (row, _, _) in enumerate(QUESTIONS) if row[1] == kind]
        low, high = 0.0, 1.0
        for _ in range(40):  # bisection: the expected number of questions grows with the rate
            rate = (low + high) / 2
            expected = sum(share * frequency[i][given] for i in mine for given, share in rates(i, kind, rate).items())
            low, high = (rate, high) if expected < wanted else (low, rate)
        for i in mine:
            table[i] = rates(i, kind, low)
    return table


def ask(heart: Heart, ecg_id: int, rng: np.random.Generator) -> list[dict]:
    """The record's ECG-QA rows, about ten; `sample_id` is numbered later, over the split."""
    true, rows = facts(heart), []
    for (row, group, question_id), rates, chance, swap in zip(QUESTIONS, asking_rates(), *rng.random((2, len(QUESTIONS)))):
        template, kind, attribute_type, family, _, wording = row
        if family not in true:
            continue
        given = answer(kind, group, true[family])
        if chance >= rates.get(given, MOST):  # an answer the survey never met is a rare one
            continue
        if kind == "choose" and swap < 0.5:
            group = group[::-1]
        question = {
            "template_id": template, "question_id": question_id, "sample_id": None, "question_type": f"single-{kind}",
            "attribute_type": attribute_type, "question": wording.format(*group) if kind != "query" else wording,
            "answer": list(given), "ecg_id": [ecg_id], "attribute": list(group),
        }  # fmt: skip
        rows.append(question)
    return rows


# --- files ------------------------------------------------------------------------------------------------------------

COLUMNS = [
    "ecg_id", "patient_id", "age", "sex", "height", "weight", "nurse", "site", "device", "recording_date", "report", "scp_codes",
    "heart_axis", "infarction_stadium1", "infarction_stadium2", "validated_by", "second_opinion", "initial_autogenerated_report",
    "validated_by_human", "baseline_drift", "static_noise", "burst_noise", "electrodes_problems", "extra_beats", "pacemaker",
    "strat_fold", "filename_lr", "filename_hr",
]  # fmt: skip
# The 28 of PTB-XL 1.0.3, in its order.



def patients(records: int, seed: int) -> list[dict]:
    """patient_id, age, sex, strat_fold of every ECG. Nothing else is shared by the ECGs of a patient, and nothing tells of the heart."""
    rng = np.random.default_rng([seed, 0])  # ECGs count from 1
    known: list[dict] = []
    folds: list[int] = []
    rows = []
    for _ in range(records):
        choice, who, age, sex = rng.random(4)  # the same four for every ECG, so that a larger corpus begins like a smaller one
        if not known or choice < 1 / ECGS_PER_PATIENT:
            if not folds:  # ten patients, ten folds: no fold runs empty
                folds = rng.permutation(np.arange(1, 11)).tolist()
            years = float(18 + int(72 * age))
            known.append({"patient_id": float(len(known) + 1), "age": years, "sex": int(sex < 0.5), "strat_fold": folds.pop()})
        rows.append(known[-1] if choice < 1 / ECGS_PER_PATIENT else known[int(who * len(known))])
    return rows


def write_record(folder: Path, name: str, signal: np.ndarray) -> None:
    """WFDB format 16 as `wfdb.wrsamp` writes it, 30 times faster: int16, samples interleaved, 1000 steps a mV.

    `signal`: float32 [12, n] in mV. Checksum: sum of the samples modulo 2**16 (WFDB header specification, header(5)).
    """
    steps = np.clip(np.rint(signal * GAIN), -32767, 32767).astype("<i2")  # -32768 means "no value"
    lines = [f"{name} {len(steps)} {SAMPLING_RATE} {steps.shape[1]}"]
    for lead, row in zip(LEADS, steps):
        lines.append(f"{name}.dat 16 {GAIN}.0(0)/mV 16 0 {row[0]} {row.sum(dtype=np.int64) % 65536} 0 {lead.replace('a', 'A')}")
    (folder / f"{name}.dat").write_bytes(steps.T.tobytes())
    (folder / f"{name}.hea").write_text("\n".join(lines) + "\n")


def _make(task: tuple[Path, int, int]) -> tuple[dict, list[dict]]:
    """Write record `ecg_id`; return its columns of ptbxl_database.csv and its questions."""
    ptbxl, seed, ecg_id = task
    rng = np.random.default_rng([seed, ecg_id])
    heart = draw(rng)
    rows = ask(heart, ecg_id, rng)
    where = f"{ecg_id // 1000 * 1000:05d}"
    name = f"{ecg_id:05d}_hr"
    write_record(ptbxl / "records500" / where, name, simulate(heart, rng))
    day = datetime.datetime(1990, 1, 1, 8) + datetime.timedelta(hours=3 * ecg_id)
    return {
        "ecg_id": ecg_id, "device": "synthetic", "recording_date": day.isoformat(sep=" "),
        "report": report(heart), "scp_codes": str(scp_codes(heart)), "heart_axis": "" if heart.rhythm == "paced" else AXIS[heart.axis][0],
        "infarction_stadium1": "Stadium I" if heart.morphology.endswith("_mi") else "",
        "second_opinion": False, "initial_autogenerated_report": True, "validated_by_human": False,
        "extra_beats": f"{heart.ectopics}{ECTOPY[heart.ectopy][3]}" if heart.ectopics else "",
        "pacemaker": "ja, pacemaker" if heart.rhythm == "paced" else "",
        "filename_lr": f"records100/{where}/{ecg_id:05d}_lr", "filename_hr": f"records500/{where}/{name}",
    }, rows  # fmt: skip


def _table(header: list[str], rows) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue()


def _statements() -> str:
    """scp_statements.csv with PTB-XL's columns; the standards' reference numbers are left empty."""
    header = ["", "description", "diagnostic", "form", "rhythm", "diagnostic_class", "diagnostic_subclass", "Statement Category",
              "SCP-ECG Statement Description", "AHA code", "aECG REFID", "CDISC Code", "DICOM Code"]  # fmt: skip
    rows = []
    for line in STATEMENTS.splitlines():
        code, description, kind, superclass, subclass, category, statement = line.split("|")
        flags = ["1.0" if kind == k else "" for k in ("diagnostic", "form", "rhythm")]
        rows.append([code, description, *flags, superclass, subclass, CATEGORIES.get(category, category), statement, "", "", "", ""])
    return _table(header, rows)


def _answers() -> str:
    classes: dict[int, set[str]] = {}
    for (template, kind, _, family, _, _), group, _ in QUESTIONS:
        always = family in ("rhythm", "axis") and kind == "query"  # one of them is always true
        more = ("no", "yes") if kind == "verify" else group if always else (*group, "none")
        classes.setdefault(template, set()).update(more)
    return _table(["template_id", "classes"], [[t, str(sorted(classes[t]))] for t in sorted(classes)])


def _write(root: Path, records: int, seed: int, workers: int) -> None:
    ptbxl = root / "ptbxl"
    for thousand in range(0, records + 1, 1000):
        (ptbxl / "records500" / f"{thousand:05d}").mkdir(parents=True)
    tasks = [(ptbxl, seed, ecg_id) for ecg_id in range(1, records + 1)]
    people = patients(records, seed)
    table: list[list] = []
    questions: dict[str, list[dict]] = {"train": [], "valid": [], "test": []}
    # "spawn": a caller may hold threads (torch, BLAS) that a fork would copy half-way.
    pool = multiprocessing.get_context("spawn").Pool(workers) if workers > 1 else None
    try:
        made = pool.imap(_make, tasks, chunksize=16) if pool else map(_make, tasks)
        for (columns, rows), person in zip(tqdm(made, total=records, unit=" ECG", desc="synthetic ECGs"), people):
            columns = {**columns, **person}
            table.append([columns.get(name, "") for name in COLUMNS])
            split = questions[SPLITS[person["strat_fold"]]]
            for row in rows:
                split.append({**row, "sample_id": len(split)})
    finally:
        if pool:
            pool.terminate()
            pool.join()
    (ptbxl / "ptbxl_database.csv").write_text(_table(COLUMNS, table))
    (ptbxl / "scp_statements.csv").write_text(_statements())
    for split, rows in questions.items():
        (root / "ecgqa" / split).mkdir(parents=True)
        for start in range(0, max(len(rows), 1), ROWS_PER_FILE):  # a split without rows still has its file, "[]"
            text = json.dumps(rows[start : start + ROWS_PER_FILE], separators=(",", ":"))
            (root / "ecgqa" / split / f"{start:05d}.json").write_text(text)
    (root / "ecgqa" / "answers_for_each_template.csv").write_text(_answers())


def write_corpus(out: str | Path, records: int = 2400, seed: int = 0, workers: int = 1) -> Path:
    """Write the corpus to `out` (see the module's docstring) and return it; nothing is written where it stands already.

    The work goes to a hidden folder beside `out`, renamed at the end, so `out` is either absent or complete.
    `workers` > 1 start processes ("spawn"): call from under `if __name__ == "__main__"`.
    Raises UserError where `out` holds anything else, or a number is out of range.
    """
    out = Path(out)
    for name, value, low, high in (("records", records, 1, 99_999), ("seed", seed, 0, 2**63), ("workers", workers, 1, 256)):
        if not low <= value <= high:
            raise UserError(f"--{name} {value}: give a number from {low} to {high}")
    arguments = {"records": records, "seed": seed, "version": VERSION}
    if out.is_dir() and any(out.iterdir()) or out.is_file():
        marker = out / "corpus.json"
        found = json.loads(marker.read_text()) if marker.is_file() else None
        if found == arguments:
            print(f"{out}: already complete ({records} ECGs, seed {seed})")
            return out
        what = f"a corpus with {found}" if found else "files that are no synthetic corpus"
        raise UserError(f"--out {out} holds {what}: name another folder, or delete it first")
    with new_folder(out) as partial:
        _write(partial, records, seed, workers)
        (partial / "corpus.json").write_text(json.dumps(arguments) + "\n")
    return out


@exit_2_on_user_error
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m toolkit.ecg.synthetic",
        description="Write a synthetic PTB-XL (12-lead ECGs, labels, reports) and ECG-QA (about ten questions an ECG). "
        "A teaching corpus, not medical data.",
        epilog="A complete OUT with the same --records and --seed is left as it is. 1,000 ECGs take 120 MB.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", required=True, default=argparse.SUPPRESS, metavar="OUT", help="folder to create, e.g. runs/demo/data")
    parser.add_argument("--records", type=int, default=2400, metavar="N", help="ECGs, 1 to 99999; folds 1-8 train, 9 valid, 10 test")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="another seed, other patients and hearts")
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--workers", type=int, default=min(8, cpus), metavar="W", help="processes; the files are the same whatever W")
    args = parser.parse_args(argv)
    out = write_corpus(args.out, args.records, args.seed, args.workers)
    print(f"{out / 'ptbxl'} and {out / 'ecgqa'} are ready: {args.records} ECGs, seed {args.seed}")


if __name__ == "__main__":
    main()
