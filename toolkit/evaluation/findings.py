"""What a report says of 27 clinical findings, by rules that can be read, and how well two reports agree on them.

The rules are for machine reports in the wording of PTB-XL (English, translated, and the German that most of its reports are in) and of
MIMIC-IV-ECG, terse ones without punctuation too. They are no model of language: what they miss, they miss in reference and prediction alike.
The list follows that of the ECG-FM labeller (its kinds of tachycardia as one), with what PTB-XL and ECG-QA ask for besides: axis, hypertrophy,
ST and T, QT, voltage, "normal ECG".
"""

import re
from functools import lru_cache, partial

import numpy as np

from toolkit.evaluation.scores import Score

GAP = r"(?: [\w&/-]+)"  # a word between the two that count
T_CHANGE = r"(?:low(?! volt)|flat\w*|invert\w*|inversion\w*|negativ\w*|biphas\w*|abnorm\w*|change\w*|peaked|tall|flach\w*|abgeflacht)"
NORMAL = r"(?:(?:ab)?normal(?:es|ly|t)?|patholog\w*)"
TRACING = r"(?:e[ck]g|electrocardiogram|tracing)"

# Text is in lower case, one space between words, ae oe ue for umlauts, without "(s)" and the like.
FINDINGS: dict[str, tuple[str, str]] = {  # finding: (label, pattern)
    "sinus_rhythm": ("Sinus rhythm (any rate)", r"\bsinus[ -]?(?:rh?yth?m\w*|tach\w*|brad\w*|arr?h?yth\w*)|\bnsr\b"),
    "atrial_fibrillation": (
        "Atrial fibrillation",  # "fibrillation/flutter" too, and not flutter: all 50 such reports of PTB-XL's folds 1-8 at hand are coded AFIB
        r"\b(?:atrial fib\w*|a[ -]?fib|af\b|vorhofflimmern|(?:flutter|flattern) ?(?:or|oder|/) ?-?(?:fib|flim)\w*)",
    ),
    "atrial_flutter": ("Atrial flutter", r"\b(?:atrial flutter|a[ -]?flutter|flutter waves?|vorhofflattern)"),
    "tachycardia": ("Tachycardia (any)", r"tach[yi][ck]ard\w*|rapid ventricular (?:response|rate)|\b(?:svt|vt|rvr)\b"),
    "bradycardia": ("Bradycardia (any)", r"brady[ck]ard\w*|slow ventricular (?:response|rate)"),
    "pvc": (
        "Ventricular premature complexes",
        r"(?<!supra[ -])\b(?:(?:pvc|vpc|vpb|ves)s?\b|premature ventric\w+ \w+|ventri[ck]ul\w+ (?:premature|ecto|extras|bigemin|trigemin|couplet)\w*)",
    ),
    "pac": (
        "Atrial premature complexes",
        r"\b(?:(?:pac|apc|apb|sves)s?\b|premature (?:atrial|supraventricular) \w+|atrial (?:premature|extras)\w*|atrial ectopic (?:beat|complex)\w*"
        r"|supra[ -]?ventri[ck]\w+ (?:premature|ecto|extras|bigemin)\w*)",
    ),
    "first_degree_av_block": (
        "First degree AV block",
        r"\b(?:(?:first|1st)[ -]degree (?:a[ -]?v|atrio\w+|heart)[ -]block|a[ -]?v[ -]?block (?:i|1|1 ?st|1 grad\w*|first)\b"
        r"|(?:prolonged|long) p[rq]\b|p[rq](?: interval)?(?: is)?(?: \w+)? (?:prolonged|prolongation|long)\b)",
    ),
    "higher_av_block": (
        "Second or third degree AV block",
        r"\b(?:(?:second|2nd|third|3rd|complete|total|high|advanced)(?:[ -](?:degree|grade))?(?: \w+)? (?:a[ -]?v|atrio\w+|heart)[ -]block"
        r"|a[ -]?v[ -]?block (?:ii|iii|2|3|second|third)\w*|mobitz|wen[ck]kebach|2 ?to ?1 a[ -]?v)",
    ),
    "rbbb": (
        "Right bundle branch block (complete or incomplete)",
        r"\b(?:right (?:bundle|leg)[ -](?:branch[ -])?block|[ic]?rbbb|rechts-?schenkelblock|rsb|schenkelblock(?: \w+)? rechts)",
    ),
    "lbbb": (
        "Left bundle branch block (complete or incomplete)",
        r"\b(?:left (?:bundle|leg)[ -](?:branch[ -])?block|[ic]?lbbb|links-?schenkelblock|lsb|schenkelblock(?: \w+)? links)",
    ),
    "fascicular_block": ("Fascicular block", r"\bfascicular block|\b(?:bi|tri)fas[ck]i[ck]ul\w+(?: block)?|hemi-?block|bifaszi\w+|\bl[ap][fh]b\b"),
    "lvh": (
        "Left ventricular hypertrophy",
        r"\b(?:(?:left ventric\w+|l ?v|left|bi-?ventric\w+) (?:hypertroph\w+|enlargement)|lvh|links[ -]?(?:ventrikel|herz)?[ -]?hypertroph\w*)",
    ),
    "rvh": (
        "Right ventricular hypertrophy",
        r"\b(?:(?:right ventric\w+|r ?v|right|bi-?ventric\w+) (?:hypertroph\w+|enlargement)|rvh|rechts[ -]?(?:ventrikel|herz)?[ -]?hypertroph\w*)",
    ),
    "infarction": ("Infarction (any age)", r"infar[ck]t\w*|\b(?:n?stemi|mi)\b|\b(?:myocardial damage|myokardschaden)"),
    "ischaemia": ("Ischaemia or injury", r"(?<!non[ -])\bischa?e?mi\w*|\binjur(?:y|ies)\b|innenschichtsch\w*"),
    "st_depression": (
        "ST depression",
        rf"\bst\b(?:-t|-segments?)?(?:-depress\w*|{GAP}{{0,3}}? depress\w*)|\bst[ -](?:strecken)?-?senkung\w*|\bdepress\w*(?: of)?(?: the)? st\b",
    ),
    "st_elevation": (
        "ST elevation",
        rf"(?<!non[ -])\bst\b(?:-t|-segments?)?(?:-elevat\w*|{GAP}{{0,3}}? elevat\w*)|\bst[ -](?:strecken)?-?hebung\w*|\belevat\w*(?: of)?(?: the)? st\b",
    ),
    "t_wave_change": (
        "T wave or ST-T change",
        rf"\bt[ -]?(?:waves?|wellen?){GAP}{{0,4}}? {T_CHANGE}|\b{T_CHANGE} t(?:[ -]?(?:waves?|wellen?))?\b|\bt {T_CHANGE}"
        rf"|\bst ?(?:[-/&]|and|und) ?t\b{GAP}{{0,3}}? (?:{T_CHANGE}|strain|deviation\w*|veraender\w*)"
        r"|repolari[sz]ation\w*(?: \w+)? (?:abnorm|change|dist|disorder)\w*",
    ),
    "long_qt": ("Long QT", rf"\b(?:long|prolong\w*|verlaenger\w*)(?: of| the| corrected)* qtc?\b|\bqtc?\b-?(?:{GAP}{{0,3}}? )?(?:prolong|long|verlaenger)\w*"),
    "low_voltage": ("Low voltage", r"\blow (?:[\w/-]+ ){0,3}?(?:volt?ages?|qrs)\b|\bvoltages?(?: \w+){0,2}? (?:low|reduced)\b|reduced voltage|niederspannung"),
    "left_axis": ("Left axis deviation", r"\bleft(?:ward)? (?:\w+-)?axis|\baxis(?: \w+){0,4}? left\b|\bleft type|linkstyp|linkslagetyp|\bm?llt\b"),
    "right_axis": ("Right axis deviation", r"\bright(?:ward)? (?:\w+-)?axis|\baxis(?: \w+){0,4}? right\b|\bright type|rechtstyp|rechtslagetyp"),
    "pacemaker": (
        "Pacemaker (device)",
        r"(?<!wandering )(?<!wandering atrial )(?<!ectopic )(?<!ectopic atrial )(?<!junctional )(?<!wandernder )\b(?:pacemaker\w*|pacer|schrittmacher\w*)"
        r"|\bpac(?:ed|ing)\b",
    ),
    "wpw": ("Pre-excitation (WPW)", r"\bwpw\b|wolff?[ -]?parkinson|pr[ae]e?-?ex[ck]itation"),
    "normal_ecg": (
        "Normal ECG, also otherwise",  # an interval alone may be within normal limits
        rf"\b{NORMAL}(?: 12[ -]lead)? {TRACING}\b|\b{TRACING}(?: \w+)? {NORMAL}\b"
        rf"|(?:^|\botherwise |\b(?:{TRACING}|study) (?:\w+ ){{0,2}})within normal limits",
    ),
    "poor_quality": (
        "Poor signal quality",
        r"\bpoor (?:\w+ )?quality|art[ei]fact\w*|baseline (?:wander|drift|instab)\w*|wandering baseline|\bnoisy\b"
        r"|\btechnical(?:ly)? (?:poor|difficult|limited|inadequate)|unsuitable for analysis|muscle tremor|(?:electrical|ac) interference",
    ),
}
RULES = {name: re.compile(pattern) for name, (_, pattern) in FINDINGS.items()}

# What becomes something else before the text is cut into clauses.
AGE = r"(?:old|recent|acute|fresh|new|age|alt|akut|frisch)"
REWRITTEN = [
    (re.compile(pattern), by)
    for pattern, by in (
        (r"\((?:s|n|en|es|a)\)|(?<=qrs)\(t\)", ""),
        (r"(\d)\. ?grad", r"\1 grad"),
        (r"\b2:1\b", "2 to 1"),
        (r"\b(moegl|wahrsch)\.", lambda cut: {"moegl": "moeglich", "wahrsch": "wahrscheinlich"}[cut[1]]),
        (r"(^|[\s(])\?\s*(?=\w)", r"\1possible "),  # "?infarct"
        (r"\?", " is possible."),
        # Of a certain infarct whose age is not: "inferior infarction probably old".
        (rf"((?:infar[ck]t\w*|myokardschaden),?) (?:is |are )?(?:possibl[ey]|probabl[ey]|likely|wahrscheinlich|moeglich\w*) {AGE}\w*", r"\1"),
        (
            r"\b(?:no|without) (?:definite |significant |other )?(?:pathology\b|abnormalit(?:y|ies)\b(?! (?:of|in)\b)|pathologi\w+ (?:findings?|changes?)\b)",
            "normal ecg",
        ),
        # Negations of something else than a finding: the clause ends with them.
        (r"\b(?:no|without) (?:significant |major |interval )*(?:change|difference|increase)\w*|\bnot (?:significantly |much )?changed|\bnot only", ";"),
        (r"\b(?:no|keine?|inga)(?: \w+)? p[ -]?(?:waves?|wellen?|vag)\b(?: (?:was |were )?(?:found|seen|visible|identified|erkannt|funna))?", ";"),
        # "no A, B or C" is one list: its commas do not end the clause.
        (r"\b(?:no|without|absence of|negative for)\b(?:[^,.;:]{1,40},){1,8} ?[^,.;:]{0,40}\bn?or\b", lambda cut: cut[0].replace(",", " or")),
    )
]
CLAUSE = re.compile(r"[.,;:!()]|\s-+\s|\b(?:but|however|although|though|yet|except(?: for)?|(?<!consistent )(?<!compatible )with)\b")

NOT_EXCLUDED = (
    r"can ?not (?:be )?(?:\w+ly )?(?:excluded|ruled out)|not (?:be )?(?:\w+ly )?(?:excluded|ruled out)|nicht (?:sicher )?(?:auszuschliessen|ausgeschlossen)"
)
NOT_SEEN = r"(?:(?:not|never|nicht) (?:\w+ )?|no longer )(?:seen|present|evident|found|visible|detected|observed|identified|noted|apparent|nachweisbar)"
BEFORE = re.compile(  # leftmost first, then the first alternative: "cannot exclude" is not a "not"
    rf"\b(?:(?P<of_what_is_before>{NOT_EXCLUDED}|{NOT_SEEN})"
    r"|(?P<absent>not (?:likely|probable|suggestive|consistent)|rules out|(?:has|have) ruled out|excludes|no longer|no|not|nor|neither|without|w/o"
    r"|absence|absent|lack of|negative for|free of|unlikely|kein\w*|ohne|nicht)"
    r"|(?P<uncertain>can ?not (?:\w+ly )?(?:rule out|exclude)|rule out|r/o|exclude|possibl[ey]|probabl[ey]|presumabl[ey]|likely|suspect(?:ed)?"
    r"|suspicious|suspicion|suggest\w*|consider|question\w*|query|equivocal|borderline|may|might|could|moegliche\w*|wahrscheinlich\w*|verdacht|vermutlich|fraglich\w*)"
    r"|(?P<said_of_none>risk of|history of|previously|(?:commonly|usually|often) due to))\b"
)
AFTER = re.compile(
    # the rest of its name: "left axis deviation is not present"
    r"(?: (?:deviation|interval|rhythms?|beats?|complex(?:es)?|contractions?|blocks?|spikes?|activity|pattern|syndrome|changes?|qrs|voltages?))?"
    r"(?: of \w+ age)?(?: (?:is|are|was|were|has|have|been|should|must|also|be|a|an|very|only|ist|sind))*"
    rf" (?:(?P<uncertain>{NOT_EXCLUDED}|moeglich|fraglich|suspected|questionable|considered|possibility|possible cause|likely cause|likely contributors?"
    r"|(?:possible|probable|likely|query)(?=\s*$))"
    rf"|(?P<absent>{NOT_SEEN}|absent|unlikely|ruled out|excluded|resolved))\b"
)
OR_BEFORE, OR_AFTER = re.compile(r"\b(?:or|oder)(?: \w+){0,3} $"), re.compile(r" (?:or|oder)\b")
AND, OF_BOTH = re.compile(r" (?:and|or|und|oder) "), re.compile(r" (?:are|were|sind) ")
REACH = 8  # words from "possible" or "no" to its finding, where no punctuation ends the clause
BACK = REACH + 8  # words looked back over; a cue of BEFORE has up to 6, so that one cut at the start of these is out of reach anyway
SHORT_REACH = {"sinus_rhythm": 2, "normal_ecg": 2}  # they open and close reports: "no signs of ... r progression v1-3 normal ecg"
UMLAUTS = str.maketrans({"ä": "ae", "ö": "oe", "ü": "ue", "ß": "ss", "å": "a", "–": "-", "—": "-", "−": "-", "’": "'", "\n": "."})


@lru_cache(maxsize=100_000)  # a reference is read once for each model and control
def _findings(text: str) -> tuple[tuple[str, str], ...]:
    text = " ".join(text.lower().translate(UMLAUTS).split())
    for pattern, by in REWRITTEN:
        text = pattern.sub(by, text)
    found: dict[str, str] = {}
    for clause in CLAUSE.split(text):
        for name, status in _clause(" ".join(clause.split())):
            found[name] = max(found.get(name, ""), status, key=("", "absent", "uncertain", "present").index)
    return tuple((name, found[name]) for name in RULES if found.get(name))


@lru_cache(maxsize=100_000)  # machine statements recur
def _clause(clause: str) -> list[tuple[str, str]]:
    mentions = [(name, mention) for name, rule in RULES.items() for mention in rule.finditer(clause)]
    ends = {mention.start(): mention.end() for _, mention in mentions}
    return [(name, _status(name, clause, mention, ends)) for name, mention in mentions]


def _status(name: str, clause: str, mention: re.Match, ends: dict[int, int]) -> str:
    """What a clause says of the finding that it mentions; '' if it is said of nobody, as a risk is. ends: of all mentions, by where they start."""
    if name == "normal_ecg" and re.search("abnormal|patholog", mention[0]):
        return "absent"
    if after := AFTER.match(clause, mention.end()):
        return after.lastgroup
    if (joint := AND.match(clause, mention.end())) and (after := _said_of_several(clause, ends.get(joint.end()))):
        return after
    start, status = _back(clause, mention.start()), "present"
    for cue in BEFORE.finditer(clause, start, mention.end()):  # the nearest has the word; it may stand inside: "t waves are not inverted"
        if cue.lastgroup != "of_what_is_before" and len(clause[cue.end() : mention.start()].split()) <= SHORT_REACH.get(name, REACH):
            status = "" if cue.lastgroup == "said_of_none" else cue.lastgroup
    either = " or " in mention[0] or OR_BEFORE.search(clause, start, mention.start()) or OR_AFTER.match(clause, mention.end())
    return "uncertain" if status == "present" and either and name != "t_wave_change" else status  # T waves "are low or flat"


def _said_of_several(clause: str, end: int | None) -> str:
    """What is said of "ST elevation and T wave inversion" behind the second, if the verb is of both; end: of the second."""
    after = AFTER.match(clause, end) if end is not None and OF_BOTH.match(clause, end) else None
    return after.lastgroup if after else ""


def _back(clause: str, place: int) -> int:
    """Where the words begin that BEFORE looks at: not all of a clause, or one of a thousand findings, as of a model that repeats itself, takes minutes."""
    for _ in range(BACK + 1):
        place = clause.rfind(" ", 0, max(place, 0))
    return max(place, 0)


def findings(text: str) -> dict[str, str]:
    """Finding (a key of FINDINGS) -> "present", "uncertain" or "absent", of those that a report mentions, in the order of FINDINGS.

    uncertain: "possible", "consider", "cannot rule out", "suggesting", "borderline", one of two named with "or", ... absent: "no", "without",
    "rules out", "is unlikely", ... Such a word reaches to the end of its clause, at most 8 words; the nearest before a finding has the say, and
    one right behind it ("... cannot be excluded") more; behind two of them, "are" is said of both. What is mentioned twice takes the strongest: present,
    uncertain, absent. "A possible old infarct" is uncertain, "an infarct, possibly old" is present: there only its age is in doubt.
    """
    return dict(_findings(text))


def raised(text: str) -> np.ndarray:
    """bool [27]: the findings that a report raises, present or uncertain, in the order of FINDINGS."""
    said = findings(text)
    return np.array([said.get(name) in ("present", "uncertain") for name in FINDINGS])


CONVENTION = (
    "27 findings by rules on the text (negation, uncertainty); one counts as said where the report calls it present or uncertain. Precision, "
    "recall and F1 over all findings of all reports; macro: the mean F1 of the findings that occur in a reference or a prediction. 0 where something "
    "is to be found or said and nothing agrees, as for an empty prediction"
)


def finding_scores(rows: list[dict], predictions: list[str]) -> list[Score]:
    """Agreement of predicted with reference reports on findings: `precision`, `recall`, `f1` over all findings (micro), `f1_macro`, the mean F1 of the
    findings that occur in any reference or prediction, and `f1:X`, `precision:X`, `recall:X` of each finding X.

    Uncertain counts as present, on both sides. A machine report hedges by habit ("possible inferior infarct, age undetermined"), and its reader
    looks for the infarct all the same: whoever leaves it out has missed something, and whoever adds it has raised a false alarm. Counted as
    absent, a model that repeats the reference word by word would win nothing for it. So a model pays for every hedge that the
    reference does not share, and that it hedged where the reference was sure is not scored.

    Stats of a row: true positives, false positives, false negatives. A score is 0 where these are not all 0 and nothing agrees (an empty
    prediction of a report with findings has precision 0, as scikit-learn's zero_division=0), nan where no text says anything.
    predictions[i] belongs to rows[i]; rows of other tasks than reports are passed over.
    """
    places = np.array([i for i, row in enumerate(rows) if row["task"] == "report"], np.int64)
    reference = np.array([raised(rows[i]["reference"]) for i in places], bool).reshape(-1, len(FINDINGS))
    predicted = np.array([raised(predictions[i]) for i in places], bool).reshape(-1, len(FINDINGS))
    counts = np.stack([reference & predicted, ~reference & predicted, reference & ~predicted], -1).astype(np.float64)  # [rows, findings, 3]
    micro = counts.sum(1)
    scores = [Score(name, label, places, micro, partial(_value, name)) for name, label in LABELS.items()]
    scores.append(Score("f1_macro", "F1, mean over findings", places, counts.reshape(-1, 3 * len(FINDINGS)), _macro))
    for i, (finding, (label, _)) in enumerate(FINDINGS.items()):
        scores += [Score(f"{name}:{finding}", f"{label}: {what}", places, counts[:, i], partial(_value, name)) for name, what in LABELS.items()]
    return scores


LABELS = {"f1": "F1", "precision": "Precision", "recall": "Recall"}


def _value(name: str, sums: np.ndarray) -> np.ndarray:
    """F1, precision or recall of sums of (true positives, false positives, false negatives) [..., 3] -> [...]."""
    true, false, missed = np.moveaxis(sums, -1, 0)
    of = {"f1": true + (false + missed) / 2, "precision": true + false, "recall": true + missed}[name]
    return np.where(sums.sum(-1) > 0, true / np.maximum(of, 0.5), np.nan)  # of: 0 or at least 0.5


def _macro(sums: np.ndarray) -> np.ndarray:
    """Mean F1 over findings that occur: sums [..., findings * 3] -> [...]."""
    each = _value("f1", sums.reshape(*sums.shape[:-1], len(FINDINGS), 3))
    occur = ~np.isnan(each)
    return np.where(occur.any(-1), np.nansum(each, -1) / np.maximum(occur.sum(-1), 1), np.nan)
