"""Cleaning of reports: identifiers always go, what is no report goes by default, what is clinical stays."""

import re
import unicodedata
from collections import Counter
from difflib import SequenceMatcher

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharding.reports import ANY_DIGIT, GROUPS, clean

CLINICAL = """PR 160 ms, QRS 90 ms, QT/QTc 380/410 ms
rate 72/min
heart rate 150 bpm, 0.05-150 Hz, 25 mm/s 10 mm/mV
1.5 mV in V1-V6
2:1 block, 3:2 Wenckebach, 10:1 ratio
II, III, aVF
P-R-T axes 54 -12 30
P-R-T axes 10-12-30
QRS duration 0.08, PR interval of 0.24 sec
pr interval 0.24 sec. credited to drugs.
infarct in 1990
v1-v3, v4,5,6, V1/2
1st degree A-V block with 4:1 conduction
63 year old patient no 1st degree block
Patient: 63-year-old
R/S>1 in V1/2
ST elevation 2-3 mm
Sokolow 3,6 mV (m,25)
160 Ms Left axis
T changes may be normal for age
second degree block, may 2 beats
inferiorer infarkt alter unbest.
cannot rule out septal infarct (cited on or before 1999)
this patient has trifascicular block
confirmed by previous tracing
Summary: ABNORMAL ECG.
st-t sänkning, såsom vid inferior ischemi
Sinus rhythm..Left axis
Sokolow 3.5.12
leads 1/2/10
rates 10/12/99, 2/3/10 bpm
confirmed by Echo
Confirmed by CT angiography
ST depression of 1.5 mm, of 2.5. V5 as before
R/S ratio of 1/2, in 2/3 leads
t waves are inverted in v4,5,6. may represent ischaemia
T INVERSION IN V5, 6 MAY BE DUE TO LVH
flat T in lead 3. May be old
r in v2, 3. marked. v1, 2 septal infarct, 3 junctional beats
in this patient 1200 ms without a p wave
moderate MR. Left axis
area 5 cm², 500 µV, -30°
9 of 10 leads, 1/2 of beats
心房細動""".split("\n")

IDENTIFYING = """13.05.1990|13.05.90|1990-05-13T10:15:03Z|1990-05-13 10:15|05/13/1990 at 10:15 am|13-05-1990|12-Jan-2020|12-JAN-20|Jan 12, 2020
January 12th 2020, 10:15|3. Mai 1990 um 10:15 Uhr|12 May 1990|May 1990|05/1990|10:15:03|10:15 Uhr|Patient ID: 17014|patient id 17014|Patienten-Nr. 4711
Fallnummer: 4711/90|MRN: A-4711|MRN 4711|ID: 12|accession no. 9-12|case no. 12|Name: Hans Müller.|name: hans|Patient name: Müller, Hans;|Patient's name: O'Brien
Dr. Xyz|dr. müller|Dr Xyz|Dr. H. Xyz|Prof. Dr. med. Hans Müller-Lüdenscheid|Herr Müller|Mrs. Smith|Confirmed by SMITH MD, JOHN
Electronically signed by: Jane Doe|Referred by: Dr. X|a.b@c.de|Tel.: 030 123456|+49 30 123456|(617) 555-0123|617-555-0123
123-45-6789|12345678|AB1234567|DOB: 13.05.1990|geb. 13.05.1990,
Mr. John Smith|Frau Anna Müller|Frau Dr. Anna Müller|Dr. Hans Peter Meyer|Dr. hans|Signed: Dr John A Smith MD|Signed: Dr. J. A. Smith, M.D.
Dr. med. van der Berg|dr. med. van der berg|Dr van der Berg|Prof. H. von und zu Berg|Dr.Meyer|Dr. Émile Żak
Mrs. Anna Maria de la Cruz|Dr. SMITH|Dr. H.-P. Meyer|Hr. Meyer
13. 05. 1990|13 / 05 / 1990|13 . 5 . 90|2020 - 05 - 13|13–05–1990|2020‑05‑13|13\N{MINUS SIGN}05\N{MINUS SIGN}1990|13.\N{SOFT HYPHEN}05.19\N{SOFT HYPHEN}90
13.\N{WORD JOINER}05.1990|13.05.19\N{ZERO WIDTH JOINER}90|１３．０５．１９９０|１３.０５.１９９０|２０２０／０５／１３|١٣.٠٥.١٩٩٠
12-May|12 May|3rd of may|12. Mai.|12. März|1-JAN|Dec 5|January 12th
patient no 12345|Patient no. 12|Case 1234|case #12|Patient 4711|born 1950|born in 1950|geb. 1950|DOB 1950|10.15 Uhr|um 10 Uhr|13.05.1990 um 10.15 Uhr"""
IDENTIFYING = re.split(r"[|\n]", IDENTIFYING)


@pytest.mark.parametrize("text", CLINICAL)
def test_what_is_clinical_stays(text):
    assert clean(text) == clean(text, boilerplate=False) == text


@pytest.mark.parametrize("boilerplate", [True, False])
@pytest.mark.parametrize("identifier", IDENTIFYING)
def test_identifiers_go_and_their_neighbours_stay(identifier, boilerplate):
    assert re.sub("[.,;]", "", clean(f"sinus rhythm {identifier} with pvcs", boilerplate=boilerplate)) == "sinus rhythm with pvcs"
    assert clean(identifier, boilerplate=boilerplate) == ""


@pytest.mark.parametrize(
    ("text", "report"),
    [
        ("sinusrhythmus normales ekg 4.46                          unbestÄtigter bericht", "sinusrhythmus normales ekg"),
        ("sinusrhythmus 4.46    unbestÄtigter bericht Edit: NORM 100, (NDT)", "sinusrhythmus"),
        ("sinus rhythm. normal ecg. Edit: NORM 100,\n(NORM 100)", "sinus rhythm. normal ecg."),
        ("sinus rhythm 4.46 unconfirmed report", "sinus rhythm"),
        ("Trace only requested.", ""),
        ("pat. uppgifter saknas! sinusrytm", "sinusrytm"),
        ("no change since trace of 12.9.91.", "no change since trace of."),
        ("ekg vom 12.5. unverändert", "ekg vom unverändert"),
        ("ekg vom 12.05, flach", "ekg vom, flach"),
        ("tracing of 05/12 shows", "tracing of shows"),
        ("tracing on may 5", "tracing on"),
        ("tracing from May 5.", "tracing from."),
        ("12.5.90: flat T. 13.05.90 S. Befund", "flat T. S. Befund"),
        ("Dr. Meyer Sinus rhythm", "Sinus rhythm"),
        ("Confirmed by Meyer. Sinus rhythm", "Sinus rhythm"),
        ("compared with tracing of 4:5,92, it is similar", "compared with tracing of, it is similar"),
        ("Sinus rhythm. *** report made without knowing patient's sex or age ***. Abnormal ECG", "Sinus rhythm. Abnormal ECG"),
        ("Sinus rhythm.*** report made without knowing patient's sex ***.Abnormal ECG.", "Sinus rhythm.Abnormal ECG."),
        ("Age not entered, assumed to be  50 years old for purpose of ECG interpretation.Sinus tachycardia.", "Sinus tachycardia."),
        ("--- Warning: Data quality may affect interpretation ---. Sinus rhythm", "Sinus rhythm"),
        ("--- Recording unsuitable for analysis - please repeat ---", ""),
        ("--- Possible measurement error ---. Sinus rhythm", "Sinus rhythm"),
        ("Analysis error", ""),
        ("--- Pediatric criteria used ---. Sinus rhythm", "Sinus rhythm"),
        ("-------------------- Pediatric ECG interpretation --------------------. Sinus rhythm", "Sinus rhythm"),
        ("-- REVIEW ADVISED --", ""),
        ("Sinus rhythm. Summary:", "Sinus rhythm."),
        ("*** CONSIDER ACUTE ST ELEVATION MI ***.Sinus rhythm.", "CONSIDER ACUTE ST ELEVATION MI.Sinus rhythm."),
        ("--- Suspect arm lead reversal - only aVF, V1-V6 analyzed ---", "Suspect arm lead reversal - only aVF, V1-V6 analyzed"),
        (" . - ", ""),
        ("", ""),
    ],
)
def test_what_is_no_report_goes_unless_it_is_to_be_kept(text, report):
    assert clean(text) == report
    kept = clean(text, boilerplate=False)
    if not re.search(r"trac(?:e|ing) (?:of|on|from)|vom|12\.5\.90|Meyer", text):  # an identifier, not boilerplate
        assert kept == (" ".join(text.split()) if re.search(r"\w", text) else "")


def test_short_reports_become_empty():
    assert clean("Sinus rhythm -", min_words=2) == "Sinus rhythm -" and clean("Sinus rhythm -", min_words=3) == ""


@pytest.mark.parametrize("text", [*CLINICAL, *IDENTIFYING])
def test_the_words_that_select_patterns_miss_nothing(text):
    plain = f" {text.lower()}".translate(ANY_DIGIT)
    for words, patterns in GROUPS:
        assert any(word in plain for word in words) or not any(pattern.search(text) for pattern in patterns)


@pytest.mark.parametrize(
    "piece",
    ["a.", "a@", "1.", "1/", "13.05.", "dr.", "dr. ", "J. ", "J.-", "mrn/", "pat-id-", "id:", "tel 1(", "+1 ",
     "(", "***", "summary:", "unbestericht", "A", "name:", "00 "],
)  # fmt: skip
def test_long_texts_take_no_more_than_their_length(piece):
    """With quadratic patterns one of these takes minutes."""
    for text in (piece * (60_000 // len(piece)), f"{piece * (60_000 // len(piece))} bericht dr. 5. Mai 1990"):
        assert "1990" not in clean(text)


def test_what_never_ends_is_no_report():
    assert clean("Sinus " + "Jan " * 100 + "2020 " * 100) == "" and clean("Sinus " + "Jan " * 5 + "2020 " * 5) == "Sinus"


def test_unicode_is_composed_and_unprintable_characters_go():
    assert clean("möglich\x00\x07\u200b\ufeff \t\r\nlinkstyp\ud800") == "möglich linkstyp"
    assert clean("2–3 mm, −30°, 5 cm², 10 µV, ½, ３ Ä") == "2-3 mm, -30°, 5 cm², 10 µV, ½, 3 Ä"


PARTS = [*CLINICAL, *IDENTIFYING, "Edit: NORM 100", "***", ". ", ", ", "\n", "ö", "ID:", "Dr.", "of"]


@settings(deadline=None)
@given(st.lists(st.sampled_from(PARTS) | st.text(max_size=8)), st.booleans())
def test_a_clean_text_is_printable_composed_and_stays_as_it_is(parts, boilerplate):
    text = clean(" ".join(parts), boilerplate=boilerplate)
    assert clean(text, boilerplate=boilerplate) == text == " ".join(text.split())
    assert unicodedata.is_normalized("NFC", text) and not any(unicodedata.category(c) == "Cs" or c == "\x00" for c in text)
    text.encode()


def test_of_real_reports_nothing_goes_but_what_is_listed(ecg_data):
    """Every word that differs between 716 of PTB-XL's reports and what is left of them."""
    tables = [ecg_data / name / "ptbxl_database.csv" for name in ("ptbxl", "ptbxl_mv")]
    if not all(table.is_file() for table in tables):
        pytest.skip(f"no ptbxl and ptbxl_mv in {ecg_data}")
    frame = pd.concat([pd.read_csv(table, dtype=str, keep_default_na=False) for table in tables])
    gone = Counter()
    for text in {text for column in ("report", "report_en") for text in frame[column]}:
        before, after = text.split(), clean(text).split()
        for kind, i, j, k, m in SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
            if kind != "equal":
                gone[" ".join(before[i:j]), " ".join(after[k:m])] += 1
    known = r"(4\.46 unbestÄtigter bericht ?)?(Edit: .*)?|trace only requested\.|pat\. uppgifter saknas!"
    rest = [(old, new) for old, new in gone if not re.fullmatch(known, old)]
    assert sorted(rest) == [
        ("of 12.9.91.", "of."), ("of 14:4:92,", "of,"), ("of 23:6:92,", "of,"), ("of 25:6,92.", "of."), ("of 4:5,92,", "of,"), ("of 9:9:91.", "of."),
    ]  # fmt: skip
    assert sum(gone.values()) > 200
