"""What is said of a synthetic heart: SCP codes, English report and ECG-QA questions, all from its parameters alone."""

import functools
import itertools

import numpy as np

from toolkit.ecg.heart import Heart, draw

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
