"""Cleaning of report text, for every source alike.

Identifiers in free text always go: dates and times of day, labelled names and numbers, titles with a name, e-mail addresses, telephone numbers, runs of
six digits or more. It is a rule by pattern, not anonymisation: a bare name ("seen by old Meyer") stays, and a finding that follows a name with
a capital letter may go with it. What an ECG report is made of stays: intervals, rates, voltages, axes, leads, block ratios, ages, years alone.
"""

import re
import unicodedata
from functools import lru_cache

# Characters that are neither text nor white space: controls, zero width space, byte order mark, halves of surrogate pairs (which UTF-8 cannot store).
UNPRINTABLE = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u200b\ufeff\ud800-\udfff]")

MONTH = r"(?:jan|feb|m[aä]r|apr|ma[iy]|jun|jul|aug|sep|o[ck]t|nov|de[cz])[a-zä]*\.?"
DAY, NUMBER, YEAR = r"(?:0?[1-9]|[12]\d|3[01])", r"(?:0?[1-9]|1[0-2])", r"(?:19|20)\d\d"
CLOCK = r"(?:[T ,]\s*(?:at |um )?\d?\d:[0-5]\d(?::[0-5]\d(?:\.\d+)?)?(?:\s*(?:[ap]\.?m\b\.?|uhr\b|h\b|z\b))?)?"
DIGITS = r"[.:#]*\s*(?=[\w/-]*\d)[\w/-]+"  # after a label: a word with a digit in it
NAME = r"(?=[A-ZÄÖÜ])[^\W\d_][\w'’-]*"  # a word with a capital letter; the look-ahead alone where the case counts

NUMBERS = (
    r"\b[\w.+-]+@[\w-]+(?:\.[\w-]+)+",  # e-mail
    rf"\b(?:patient(?:en)?|pat|case|fall|study|hospital|medical record|account)[.\s-]*(?:id|nr|number|nummer|no(?=[.:#])){DIGITS}",  # "no" may be a word
    rf"\b(?:mrn|ssn|nhs|accession(?: n(?:o|r|umber))?|id\s*(?=[:#])){DIGITS}",
    r"\b(?:tel|phone|telephone|telefon|fax|mobile|mobil|pager)\b[.:]*\s*\+?\d[\d ()/.-]{3,}\d",
    r"\+\d[\d ()/.-]{6,}\d",  # +49 30 123456
    r"(?<!\d)(?:\(\d{3}\) ?|\d{3}[-.])\d{3}[-.]\d{4}(?!\d)",  # 617-555-0123
    r"(?<!\d)\d{3}-\d\d-\d{4}(?!\d)",  # social security number
    rf"(?<![\d.,/-]){YEAR}([-/.]){NUMBER}\1{DAY}(?!\d){CLOCK}",  # 1990-05-13
    # 13.05.1990, 05/13/90, 13-05-1990. Two-digit years only after . and /: three numbers with hyphens may be axes.
    rf"(?<![\d.,/-])(?:{DAY}([./-]){NUMBER}|{NUMBER}([./-]){DAY})(?:\1|\2)(?:{YEAR}|(?<!-)\d\d)(?!\d|[.,/-]\d){CLOCK}",
    rf"(?<=\bof ){DAY}[.,:/]{NUMBER}[.,:/](?:{YEAR}|\d\d)(?!\d)",  # PTB-XL: "compared with tracing of 4:5,92"
    rf"\b{DAY}(?:st|nd|rd|th)?(?:\.?\s*(?:of )?|-){MONTH}[\s,-]*(?:{YEAR}|(?<=-)\d\d)\b{CLOCK}",  # 12-Jan-2020, 3. Mai 1990
    rf"\b{MONTH}\s+(?:{DAY}(?:st|nd|rd|th)?,?\s+)?{YEAR}\b{CLOCK}",  # Jan 12, 2020; May 1990
    rf"(?<![\d.,/:-]){NUMBER}/{YEAR}(?!\d)",  # 05/1990
    r"(?<![\d:])(?:[01]?\d|2[0-3]):[0-5]\d(?::[0-5]\d(?:\.\d+)?|\s*(?:[ap]\.?m\b\.?|uhr\b))",  # 10:15:03, 10:15 Uhr; 10:15 alone may be a ratio
    r"(?<![\d.,])[a-z]{0,3}\d{6,}",  # record numbers; no figure of an ECG has six digits
)
NAMES = (
    r"\b(?:d\.?o\.?b\.?|date of birth|geburtsdatum)\s*:?|\b(?:born|geb(?:oren|\.)?(?: am)?)\s*:?\s*(?=[.,;]|$)",  # the label of a date that is gone
    rf"\b(?:electronically |over)?(?:confirmed|reviewed|interpreted|signed|read|validated|referred|ordered|performed) by\b:?\s*"
    rf"(?-i:{NAME})(?:[,.]?\s*(?-i:{NAME})){{0,3}}",
    # The first word after "name:" and "dr." may be in lower case, as all of PTB-XL's reports are.
    rf"\b(?:(?:patient(?:en)?['’]?s?|first|last|family)[ -]?|vor|nach|sur)?name\s*[:=]\s*[^\W\d_][\w'’-]*(?:(?:,\s*|\s+)(?-i:{NAME})){{0,2}}",
    rf"\b(?:prof|dr)\.(?:\s*(?:prof|dr|med|habil)\.)*\s+(?:(?-i:[A-Z])\.\s*)*[^\W\d_][\w'’-]*(?:[ -](?-i:{NAME}))?",
    rf"\b(?:prof|dr|doctor|doktor)\s+(?:(?-i:[A-Z])\.\s*)*(?-i:{NAME})(?:[ -](?-i:{NAME}))?",
    rf"(?<!\d)(?<!\d )\b(?-i:Mr|Mrs|Ms|Herrn?|Frau)\b\.?\s+(?-i:{NAME})",  # not "160 Ms"
)
BOILERPLATE = (
    # PTB-XL. The first are a validator's codes after the report ("Edit: NORM 80, IRBBB 50"): the labels themselves, never to be learnt as text.
    r"\b(?-i:Edit):.*",
    r"(\b\d\.\d\d\s+)?unbest\S+ bericht\.?",  # "4.46   unbestätigter bericht": device software version, "unconfirmed report"
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


# Each group is tried only where one of its words is in the text, digits as 0, lower case: for 285 characters that costs 46 us, without it 540.
ANY_DIGIT = str.maketrans("123456789", "000000000")
GROUPS = [
    (words, [re.compile(pattern, re.IGNORECASE | re.DOTALL) for pattern in patterns])
    for words, patterns in (
        (("00", "@", "id", "nr", "no.", "no:", "no#", "number", "nummer", "mrn", "ssn", "nhs", "accession"), NUMBERS),
        (("name", "dr", "prof", "doctor", "doktor", "mr", "ms", "herr", "frau", "dob", "d.o.b", "birth", "born", "geb", " by"), NAMES),
        (
            ("edit:", "bericht", "report", "trace only", "uppgifter", "interpretation", "recording", "error", "pediatric", "review", "summary:")
            + ("**", "==", "--"),
            BOILERPLATE,
        ),
    )
]


@lru_cache(maxsize=100_000)  # machine reports recur
def clean(text: str, *, boilerplate: bool = True, min_words: int = 1) -> str:
    """`text` as a report to learn from: no identifiers, white space collapsed, Unicode NFC, no control characters; '' if nothing is left.

    - boilerplate: also remove what is no report: validators' codes ("Edit: NORM 100"), "unconfirmed report" and its German, "trace only requested",
      remarks on the analysis ("report made without knowing patient's sex or age", "Age not entered, assumed to be 50 years old ..."), rows of ***
      (prepare: --keep_boilerplate keeps them).
    - min_words: a report of fewer words becomes '' (prepare: --min_report_words). A word has a letter or a digit.

    Cleaning a clean text changes nothing.
    """
    text = " ".join(unicodedata.normalize("NFC", UNPRINTABLE.sub("", text)).split())
    groups = GROUPS if boilerplate else GROUPS[:2]
    while (less := _without(text, groups)) != text:
        text = less
    words = sum(any(c.isalnum() for c in word) for word in text.split())
    return text if words >= max(min_words, 1) else ""


def _without(text: str, groups: list[tuple[tuple[str, ...], list[re.Pattern]]]) -> str:
    """`text` without what the groups find; where that is something, also without the punctuation it leaves alone."""
    less, plain = text, text.lower().translate(ANY_DIGIT)
    for words, patterns in groups:
        if any(word in plain for word in words):
            for pattern in patterns:
                less = pattern.sub(" ", less)
    if less == text:
        return text
    less = re.sub(r"\s+(?=[.,;:!)](?!\d))", "", less)  # "trace of ." -> "trace of."
    less = re.sub(r"[(\[]\s*[)\]]", "", less)
    less = re.sub(r"([.!?,;:])(?:\s*[.,;:])+", r"\1", less)
    return " ".join(re.sub(r"^[\s.,;:!)/-]+", "", less).split())
