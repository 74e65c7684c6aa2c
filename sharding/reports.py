"""Cleaning of report text, for every source alike.

Identifiers in free text always go: dates and times of day, labelled names and numbers, titles with a name, e-mail addresses, telephone numbers, runs of
six digits or more. It is a rule by pattern, not anonymisation. What stays: a bare name ("seen by old Meyer"), one after "MR."
(mitral regurgitation) or "mr."; a day and month without a year as "ekg 12.5." (no word before the figures) or "12 may" (a verb); a time of day without
seconds, am, pm or Uhr ("10:15" may be a ratio); years alone.
What an ECG report is made of stays: intervals, rates, voltages, axes, leads, block ratios, ages. Privacy goes before the rest: three numbers
that look like a date go ("10/12/99") unless "rates", "leads", "axes", "ratio", "index", "Sokolow" stands before them or a unit behind; capitalised words
after a name may go with it ("Dr. Meyer Inferior Infarct" whole, "Dr. Meyer Sinus rhythm" not: see MEDICAL).
"""

import re
import unicodedata
from functools import lru_cache

# Characters that are neither text nor white space: controls, soft hyphen, zero width space and joiners, directional marks, byte order mark,
# halves of surrogate pairs (which UTF-8 cannot store). Within a date they would hide it.
UNPRINTABLE = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")
# Dashes and the full-width -./: and @ as ASCII has them. Not NFKC, which would make ² a 2.
FOLDED = str.maketrans("‐‑‒–—―−－．／：＠", "-------" + "-./:@")
OTHER_DIGIT = re.compile(r"(?![0-9])\d")  # full-width, Arabic ...; not ², which is no decimal digit

MONTH = r"(?:jan|feb|m[aä]r|apr|ma[iy]|jun|jul|aug|sep|o[ck]t|nov|de[cz])[a-zä]*\.?"  # beside a year
# Alone beside a day: whole words, so that neither "septal" nor "marked" is one. "may" is a word of every second report: see MAY.
FULL_MONTH = (
    r"(?:jan(?:uar[yi]?)?|jänner|feb(?:ruar[yi]?)?|m[aä]rz|mrz|mar(?:ch)?|apr(?:il)?|mai|jun[ie]?|jul[iy]?|aug(?:ust)?|sept?(?:ember)?|o[ck]t(?:ober)?"
    r"|nov(?:ember)?|de[cz](?:ember)?)\b\.?"
)
DAY, NUMBER, YEAR = r"(?:0?[1-9]|[12]\d|3[01])", r"(?:0?[1-9]|1[0-2])", r"(?:19|20)\d\d"
ORDINAL = rf"{DAY}(?:st|nd|rd|th)"
CLOCK = r"(?:[T ,]\s*(?:at |um )?\d?\d:[0-5]\d(?::[0-5]\d(?:\.\d+)?)?(?:\s*(?:[ap]\.?m\b\.?|uhr\b|h\b|z\b))?)?"
DIGITS = r"[.:#]*\s*(?=[\w/-]{0,40}\d)[\w/-]+"  # after a label: a word with a digit in it
NO_UNIT = r"(?!\s?(?:(?:mm|cm|[mµμ]v|ms|m?sec|seconds?|hz|bpm|/\s?min|beats?|leads?|complexes|degrees?)\b|[%°]))"
NO_RATE = r"(?!\s?(?:(?-i:mm|mV|ms|bpm)\b|/\s?min\b))"
NO_VERB = r"(?!\s+(?:be|represent|reflect|indicate|suggest|have|also|not|occur|mean|well|still|only|show|just)\b)"
NO_FIGURES = "".join(rf"(?<!\b{word} )" for word in ("sokolow", "lead", "leads", "rate", "rates", "axis", "axes", "ratio", "index"))
GERMAN, ENGLISH = ("(?:" + "|".join(rf"(?<=\b{word} )" for word in words) + ")" for words in (("vom", "am", "seit", "dated"), ("of", "from", "on", "dated")))
MAY = rf"(?-i:May|MAY)\b{NO_VERB}"

# Words with a capital letter that are no names: "confirmed by Echo", "Dr. Meyer Sinus rhythm".
MEDICAL = (
    r"(?!(?:e[ck]gs?|echo\w*|mri|ct|cath\w*|angio\w*|holter|previous|prior|sinus\w*|rhythm\w*|atrial|ventricular|(?:ab)?normal\w*|vorhof\w*|lagetyp|linkstyp"
    r"|\w+card(?:ia|ie)|[lr]?bbb|[lr]vh|p[av]cs?|qrs|qtc?|n?stemi)\b)"
)
UPPER = "A-ZÀ-ÖØ-ÞĆČĎĐĞİŁŃŇŘŚŞŠŤŮŹŻŽ"
NAME = rf"(?i:{MEDICAL})[{UPPER}][\w'’-]*"
PARTICLE = r"(?:(?i:van|von|vom|vande[rn]?|zu|zur|zum|der|den|dem|de|del|della|di|da|dos|du|la|le|ten|ter)\s+)"
WORD = rf"(?-i:(?:[{UPPER}]\.[\s-]*|[{UPPER}]\s+){{0,2}}{PARTICLE}{{0,3}}{NAME})"  # with initials and particles: "H. van der Berg"
DEGREE = r"(?:,?\s+(?-i:MD|M\.\s?D\.|PhD|DO|RN|FACC)(?!\w))*"
PERSON = rf"{WORD}(?:[ -]{WORD}){{0,2}}{DEGREE}"
TITLE = r"(?:(?:prof|dr|med|habil|univ|doctor|doktor)\b\.?\s*)"

NUMBERS = (
    r"\b[\w.+-]{1,64}@[\w-]+(?:\.[\w-]+)+",  # e-mail; bounded, or it tries every start in "a.a.a.a" to the end
    # "no" may be a word: "patient no 1st degree block"
    rf"\b(?:patient(?:en)?|pat|case|fall|study|hospital|medical record|account)[.\s-]*(?:id|nr|number|nummer|no(?=[.:#]|\s+\d{{4}})){DIGITS}",
    rf"\b(?:patient(?:in)?|pat|case|fall|study|record|chart|account)[.:\s]*(?:#\s*\d+|\d{{4,}})\b{NO_UNIT}",  # Case 1234
    rf"\b(?:mrn|ssn|nhs|accession(?: n(?:o|r|umber))?|id\s*(?=[:#])){DIGITS}",
    r"\b(?:tel|phone|telephone|telefon|fax|mobile|mobil|pager)\b[.:]*\s*\+?\d[\d ()/.-]{3,}\d",
    r"\+\d[\d ()/.-]{6,}\d",  # +49 30 123456
    r"(?<!\d)(?:\(\d{3}\) ?|\d{3}[-.])\d{3}[-.]\d{4}(?!\d)",  # 617-555-0123
    r"(?<!\d)\d{3}-\d\d-\d{4}(?!\d)",  # social security number
    rf"(?<![\d.,/-]){YEAR}\s*([-/.])\s*{NUMBER}\s*\1\s*{DAY}(?!\d){CLOCK}",  # 1990-05-13
    rf"(?<![\d.,/-])(?:{DAY}\s*([./-])\s*{NUMBER}|{NUMBER}\s*([./-])\s*{DAY})\s*(?:\1|\2)\s*{YEAR}(?!\d|[.,/-]\d){CLOCK}",  # 13. 05. 1990, 05/13/1990
    # Two-digit years only after . and /: three numbers with hyphens may be axes.
    rf"(?<![\d.,/-]){NO_FIGURES}(?:{DAY}\s*([./])\s*{NUMBER}|{NUMBER}\s*([./])\s*{DAY})\s*(?:\1|\2)\s*\d\d(?!\d|[.,/-]\d){NO_RATE}{CLOCK}",
    rf"(?<=\bof ){DAY}[.,:/]{NUMBER}[.,:/](?:{YEAR}|\d\d)(?!\d)",  # PTB-XL: "compared with tracing of 4:5,92"
    rf"\b{DAY}(?:st|nd|rd|th)?(?:\.?\s*(?:of )?|\s*-\s*){MONTH}[\s,-]*(?:{YEAR}|(?<=-)\d\d)\b{CLOCK}",  # 12-Jan-2020, 3. Mai 1990
    rf"\b{MONTH}\s+(?:{DAY}(?:st|nd|rd|th)?,?\s+)?{YEAR}\b{CLOCK}",  # Jan 12, 2020; May 1990
    rf"(?<![\d.,/:-])(?:{NUMBER}\s*/|0[1-9][.-])\s*{YEAR}(?!\d)",  # 05/1990
    # Day and month without a year. Decimals stay: "depression of 1.5".
    rf"{GERMAN}{DAY}\s*\.\s*{NUMBER}(?:\.(?!\d)|(?!\d|[.,]\d){NO_UNIT})",  # ekg vom 12.5.
    rf"{ENGLISH}(?<!ratio of )(?<!rate of )(?:{DAY}\s*/\s*{NUMBER}|{NUMBER}\s*/\s*{DAY})(?!\d|[.,/-]\d){NO_UNIT}",  # tracing of 05/12
    rf"(?<![\w.,/-])(?:{DAY}\.?|{ORDINAL}(?: of)?)\s*-?\s*{FULL_MONTH}(?!\w)",  # 12. Mai, 12-Jan, 3rd of June
    rf"(?<![\w.,/-])(?:{DAY}\s?-?\s?{MAY}|{ORDINAL}\s+(?:of )?may\b{NO_VERB})",  # not "in lead 3. May be old"
    rf"\b{FULL_MONTH}\s+{DAY}(?:st|nd|rd|th)?\b(?![.,:/-]\d){NO_UNIT}",  # Jan 12
    rf"\b(?:may\s+{ORDINAL}\b|{MAY}\s+{DAY}(?=\s*(?:[.,;)](?!\d)|$))|{ENGLISH}may\s+{DAY}\b(?![.,:/-]\d){NO_UNIT})",
    rf"\b(?:born|geb(?:oren|\.)?|jahrgang|d\.?o\.?b\.?|(?:year|date) of birth|geburts(?:datum|jahr))\s*:?(?:\s*(?:in|on|am))?\s*{YEAR}\b",  # born 1950
    r"(?<![\d:])(?:[01]?\d|2[0-3]):[0-5]\d(?::[0-5]\d(?:\.\d+)?|\s*[ap]\.?m\b\.?)",  # 10:15:03; 10:15 alone may be a ratio
    r"(?<![\d.,:])(?:\bum )?(?:[01]?\d|2[0-3])(?:[.:]?[0-5]\d)?\s*uhr\b",  # 10.15 Uhr
    r"(?<![\d.,])[a-z]{0,3}\d{6,}",  # record numbers; no figure of an ECG has six digits
)
NAMES = (
    r"\b(?:d\.?o\.?b\.?|date of birth|geburtsdatum)\s*:?|\b(?:born|geb(?:oren|\.)?(?: am)?)\s*:?\s*(?=[.,;]|$)",  # the label of a date that is gone
    rf"\b(?:(?:electronically |over)?(?:confirmed|reviewed|interpreted|signed|read|validated|referred|ordered|performed) by\b:?|signed\s*:)\s*"
    rf"{TITLE}{{0,4}}{WORD}(?:,?\s+{WORD}){{0,3}}{DEGREE}",
    # The first word after "name:" and "dr." may be in lower case, as all of PTB-XL's reports are.
    rf"\b(?:(?:patient(?:en)?['’]?s?|first|last|family)[ -]?|vor|nach|sur)?name\s*[:=]\s*{PARTICLE}{{0,3}}[^\W\d_][\w'’-]*(?:(?:,\s*|\s+){WORD}){{0,2}}",
    rf"(?<!\d)(?<!\d )\b(?:(?-i:Mr|Mrs|MRS|Ms|Miss|Herrn?|HERRN?|Frau|FRAU)\b\.?\s+|(?-i:Hr|Fr)\.\s*){TITLE}{{0,4}}{PERSON}",  # not "160 Ms"
    rf"\b(?:prof|dr)\.\s*{TITLE}{{0,4}}(?:(?-i:[{UPPER}])\.[\s-]*){{0,3}}{PARTICLE}{{0,3}}[^\W\d_][\w'’-]*(?:[ -]{WORD}){{0,2}}{DEGREE}",
    rf"\b(?:prof|dr|doctor|doktor)\s+{TITLE}{{0,4}}{PERSON}",
)
BOILERPLATE = (
    # PTB-XL. The first are a validator's codes after the report ("Edit: NORM 80, IRBBB 50"): the labels themselves, never to be learnt as text.
    r"\b(?-i:Edit):.*",
    r"(\b\d\.\d\d\s+)?unbest\S{1,20} bericht\.?",  # "4.46   unbestätigter bericht": device software version, "unconfirmed report"
    r"(\b\d\.\d\d\s+)?unconfirmed report\.?",  # the same, translated
    r"trace only requested\.?",
    r"pat\. uppgifter saknas!?",  # "patient data are missing"
    # MIMIC-IV-ECG: remarks on the analysis. "Suspect arm lead reversal", which can be seen in the ECG, is kept.
    r"(?:report|interpretation) made without know(?:ing|ledge of) (?:the )?patient'?s? ?(?:sex|age|gender)(?:\s*(?:or|and|/)\s*(?:sex|age|gender))?",
    r"age not entered,? assumed to be\s+\d+ years old for purpose of ecg interpretation",
    r"(?:warning: )?data quality may affect interpretation",
    r"recording unsuitable for analysis - please repeat",
    r"possible measurement error",
    r"\banalysis error\b",
    r"pediatric (?:criteria used|ecg interpretation)",
    r"(?:physician |manual )?review (?:is )?(?:advised|required|recommended)\b",
    r"summary:\s*(?=[.*=-]*\s*$)",  # with nothing behind it; "Summary: abnormal ECG" is kept
    r"[*=]{2,}|-{2,}",  # what such remarks stand between: "*** CONSIDER ACUTE ST ELEVATION MI ***" keeps its words
)


# Each group is tried only where one of its words is in the text, digits as 0, lower case: on PTB-XL's reports 0.14 ms each, without it 0.34.
ANY_DIGIT = str.maketrans("123456789", "000000000")
GROUPS = [
    (words, [re.compile(pattern, re.IGNORECASE | re.DOTALL) for pattern in patterns])
    for words, patterns in (
        (("00", " 0", "(0", "0.0", "0/0", "0-0", "@", "id", "nr", "no.", "no:", "no#", "number", "nummer", "mrn", "ssn", "nhs", "accession", "#"), NUMBERS),
        (
            ("name", "dr", "prof", "doctor", "doktor", "mr", "ms", "miss", "herr", "frau", "hr.", "fr.")
            + ("dob", "d.o.b", "birth", "born", "geb", " by", "signed"),
            NAMES,
        ),
        (
            ("edit:", "bericht", "report", "trace only", "uppgifter", "interpretation", "recording", "error", "pediatric", "review", "summary:")
            + ("**", "==", "--"),
            BOILERPLATE,
        ),
    )
]
PASSES = 20  # what goes may leave what goes next ("Jan Jan 2020 2020"): without a bound, as many passes as words


@lru_cache(maxsize=100_000)  # machine reports recur
def clean(text: str, *, boilerplate: bool = True, min_words: int = 1) -> str:
    """`text` as a report to learn from: no identifiers, white space collapsed, Unicode NFC, no control characters; '' if nothing is left.

    Dashes become "-" and decimal digits of any script 0-9, without which they hide dates; µ and ² stay as they are.

    - boilerplate: also remove what is no report: validators' codes ("Edit: NORM 100"), "unconfirmed report" and its German, "trace only requested",
      remarks on the analysis ("report made without knowing patient's sex or age", "Age not entered, assumed to be 50 years old ..."), rows of ***
      (prepare: --keep_boilerplate keeps them).
    - min_words: a report of fewer words becomes '' (prepare: --min_report_words). A word has a letter or a digit.

    Cleaning a clean text changes nothing. A text in which PASSES passes still find something is no report: ''.
    """
    text = OTHER_DIGIT.sub(lambda digit: str(unicodedata.decimal(digit[0])), UNPRINTABLE.sub("", text).translate(FOLDED))
    text = " ".join(unicodedata.normalize("NFC", text).split())
    groups = GROUPS if boilerplate else GROUPS[:2]
    for _ in range(PASSES):
        less = _without(text, groups)
        if less == text:
            break
        text = less
    else:
        return ""
    words = sum(any(c.isalnum() for c in word) for word in text.split())
    return text if words >= max(min_words, 1) else ""


def _without(text: str, groups: list[tuple[tuple[str, ...], list[re.Pattern]]]) -> str:
    """`text` without what the groups find; where that is something, also without the punctuation it leaves alone."""
    less, plain = text, f" {text.lower()}".translate(ANY_DIGIT)
    for words, patterns in groups:
        if any(word in plain for word in words):
            for pattern in patterns:
                less = pattern.sub(" ", less)
    if less == text:
        return text
    less = " ".join(less.split())
    less = re.sub(r" (?=[.,;:!)](?!\d))", "", less)  # "trace of ." -> "trace of."
    less = re.sub(r"[(\[]\s*[)\]]", "", less)
    less = re.sub(r"([.!?,;:])(?:\s*[.,;:])+", r"\1", less)
    return " ".join(re.sub(r"^[\s.,;:!)/-]+", "", less).split())
