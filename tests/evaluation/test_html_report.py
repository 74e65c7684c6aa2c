"""The page is parsed, not searched: what a reader sees, what a browser would fetch, what a screen reader says. Its script runs in test_report_browser.py."""

import base64
import copy
import hashlib
import json
import re
import zlib
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from toolkit.evaluation.html_report import STEP, packed_cases, packed_ecg, write_report

VOID = {"meta", "rect", "line", "input", "br"}


def line(score, label, level="all", of="all", section="ECG-QA", n=100, model=0.5, shuffled=0.25, difference=(0.25, 0.1, 0.4), interval=(0.4, 0.6)):
    differences = {} if difference is None else {"shuffled": dict(zip(("difference", "low", "high"), difference))}
    return {
        "section": section, "score": score, "label": label, "level": level, "of": of, "n": n, "patients": 7,
        "values": {"model": model, "majority": None, "shuffled": shuffled}, "interval": interval and list(interval), "differences": differences,
    }  # fmt: skip


METRICS = {
    "columns": ["model", "majority", "shuffled"],
    "table": [
        line("exact_match", "Exact match", n=41093, model=0.7312, shuffled=0.677, difference=(0.0542, 0.0412, 0.0671), interval=(0.71, 0.75)),
        line("invalid", "Invalid answers", model=0.02, shuffled=0.01, difference=(0.01, 0.002, 0.02)),
        line("exact_match", "Exact match", "question_type", "single-verify", model=0.289, shuffled=0.301, difference=(-0.012, -0.02, -0.001)),
        line("exact_match", "Exact match", "question_type", "single-query", n=1, model=None, shuffled=None, difference=None, interval=None),
        line("answer_f1", "Answer F1", "question_type", "single-query"),
        line("exact_match", "Exact match", "template", "8"),
        line("exact_match", "Exact match", "moon_phase", "full"),
        line("rouge_l", "ROUGE-L", section="Reports"),
        line("f1:atrial fibrillation", "F1, atrial fibrillation", "finding", "atrial fibrillation", section="Clinical findings"),
    ],
    "notes": ["3 of 41,093 predictions are empty."],
    "conventions": {"exact_match": "set equality"},
}
ROWS = [
    {
        "id": "a", "task": "ecgqa", "question_type": "single-verify", "question": "Is this normal?", "reference": "yes", "prediction": "no", "loglik": -0.5,
        "controls": {"shuffled": "yes"}, "sample": 3, "labels": ["NORM"],
    },
    {"task": "report", "reference": "sinus rhythm.", "prediction": "normal rhythm."},
]  # fmt: skip
ECG = {
    "title": "ECG 7", "note": "", "fs": 250, "unit": "mV", "signal": np.zeros((12, 2500), np.float32), "reconstruction": None,
    "tokens": np.arange(313, dtype=np.uint16), "levels": [6, 6, 6, 6],
}  # fmt: skip
INFO = {"model": "/home/anna/runs/a & b/", "shards": ["s3://some/one", "two"], "ECGs": 3214, "adapter": None, "lr": 1e-4}


class Page(HTMLParser):
    """Elements with their attributes, table rows as text, all visible text, and what stands in scripts; fails on unbalanced tags."""

    def __init__(self, source):
        super().__init__()
        self.elements, self.open, self.rows, self.text, self.scripts, self.folded = [], [], [], [], {}, []
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
            if "details" in self.open:
                self.folded.append(self.rows[-1])
        if tag in ("th", "td"):
            self.rows[-1].append([])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "script" in self.open:
            self.scripts[self.elements[-1][1].get("id")] = data
        elif "style" not in self.open and data.strip():
            self.text.append(data.strip())
            if "th" in self.open or "td" in self.open:
                self.rows[-1][-1].append(data.strip())

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture
def page(tmp_path):
    def render(metrics=METRICS, rows=ROWS, ecgs=None, info=INFO):
        write_report(tmp_path / "report.html", metrics, rows, {3: [ECG]} if ecgs is None else ecgs, info)
        return Page((tmp_path / "report.html").read_text(encoding="utf-8"))

    return render


def test_every_number_stands_in_its_table_beside_its_controls(page):
    rows = page().rows
    assert [["Score"], ["n"], ["Model"], ["majority"], ["shuffled"]] in rows
    assert [["Exact match"], ["41,093", "7 patients"], ["73.1", "71.0 to 75.0"], ["–"], ["67.7", "+5.4", "+4.1 to +6.7"]] in rows
    assert [["single-verify"], ["100", "7 patients"], ["28.9", "40.0 to 60.0"], ["–"], ["30.1", "−1.2", "−2.0 to −0.1"]] in rows
    assert [["single-query"], ["1", "7 patients"], ["–"], ["–"], ["–"]] in rows


def test_groups_follow_all_rows_and_the_long_tables_are_folded(page):
    shown = page()
    text = shown.text
    titles = ["Exact match, by question type", "Answer F1, by question type (1)", "Exact match, by template (1)", "Exact match, by moon phase (1)"]
    assert [t for t in text if ", by " in t] == [*titles, "F1, by finding (1)"]
    folded = [row[0] for row in shown.folded if row[1] != ["n"]]
    assert folded == [["single-query"], ["8"], ["full"], ["atrial fibrillation"]]
    assert len(shown.all("svg")) == len(METRICS["table"]) - 1  # all but that of the line without a value


def test_worse_is_worse_also_where_fewer_is_better(page, tmp_path):
    page()
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert re.findall(r'class="worse">([^<]*)<', source) == ["+1.0", "−1.2"]  # invalid answers, and single-verify
    metrics = copy.deepcopy(METRICS)
    metrics["table"][0]["differences"]["shuffled"]["difference"] = -1e-5
    assert ["67.7", "+0.0", "+4.1 to +6.7"] in page(metrics).rows[len(INFO) + 1]


def test_the_legend_says_where_fewer_is_better(page):
    def legends(metrics):
        return " ".join(text for text in page(metrics).text)

    assert legends(METRICS).count("Of invalid answers fewer are better.") == 1  # of three sections
    assert "how much better" not in legends(METRICS) and "model's score minus the control's" in legends(METRICS)
    assert "fewer are better" not in legends({**METRICS, "table": METRICS["table"][2:]})


def test_the_page_opens_with_exact_match_else_rouge(page):
    def lead(shown):
        start, end = shown.text.index("ECG evaluation report", 1), shown.text.index("Research software. Not a medical device; not for diagnosis.")
        return " ".join(shown.text[start + 1 : end])

    said = lead(page())
    assert said.startswith("73.1\xa0% exact match over 41,093 questions (95\xa0% interval 71.0 to 75.0); the shuffled control reaches 67.7\xa0%")
    assert "+5.4 points (+4.1 to +6.7)" in said
    assert lead(page({**METRICS, "table": METRICS["table"][-2:]})).startswith("50.0\xa0% ROUGE-L over 100 reports")
    assert lead(page({**METRICS, "table": []}, rows=[], ecgs={})) == ""


def test_info_is_shown_in_order_and_readable_and_so_are_notes_and_conventions(page):
    shown = page()
    assert shown.rows[:5] == [[["model"], ["a & b"]], [["shards"], ["one, two"]], [["ECGs"], ["3,214"]], [["adapter"], ["–"]], [["lr"], ["0.0001"]]]
    assert not any("anna" in text for text in shown.text)
    assert METRICS["notes"][0] in shown.text and "set equality" in shown.text


def test_bars_have_the_length_of_the_score_and_a_mark_at_the_control(page):
    shown = page()
    assert [rect["width"] for rect in shown.all("rect") if rect["class"] == "model"][:2] == ["73.12%", "2.00%"]
    assert [one["x1"] for one in shown.all("line")][:2] == ["67.70%", "1.00%"]
    assert shown.all("svg")[0]["aria-label"] == "model 73.1, shuffled 67.7 of 100"


def test_what_a_model_or_a_file_wrote_is_text_never_markup(page):
    attack = "</script><script>alert('x')</script><!--<img src=http://evil/ onerror=x>\""
    metrics = copy.deepcopy(METRICS)
    metrics |= {"notes": [attack], "conventions": {attack: attack}}
    metrics["table"][2] |= {"label": attack, "of": attack, "level": attack}
    metrics["table"][0]["section"] = attack
    rows = [{**ROWS[0], **dict.fromkeys(("id", "question", "reference", "prediction", "question_type", "site"), attack), "controls": {attack: attack}}]
    shown, tame = page(metrics, rows, {3: [{**ECG, "title": attack, "note": attack}]}, {attack: attack}), page()
    assert len(shown.all("script")) == len(tame.all("script")) == 3 and not shown.all("img")
    assert shown.text.count(attack) >= 6
    assert attack in json.loads(shown.scripts["cases"])["texts"] and json.loads(shown.scripts["ecg-3-0"])["title"] == attack


def test_nothing_is_fetched_and_only_the_pages_own_script_runs(page, tmp_path):
    shown = page()
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|@import|url\(", source)
    assert not {"link", "iframe", "object", "img", "base", "form"} & {name for name, _ in shown.elements}
    assert not any(name in a or name.startswith("on") for _, a in shown.elements for name in ("src", "href", "srcset", "data", "action"))
    policy = next(meta["content"] for meta in shown.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(shown.scripts[None].encode()).digest()).decode()
    assert policy.startswith(f"default-src 'none'; script-src 'sha256-{digest}';")


def test_the_page_is_accessible_and_says_what_it_is_not(page):
    shown = page()
    assert shown.text.count("Research software. Not a medical device; not for diagnosis.") == 3  # above, below, and with every case
    assert shown.all("html")[0]["lang"] == "en" and any("viewport" == meta.get("name") for meta in shown.all("meta"))
    assert all(header.get("scope") in ("row", "col") for header in shown.all("th")) and len(shown.all("h1")) == 1
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in shown.all("svg"))
    ids = [a["id"] for _, a in shown.elements if "id" in a]
    assert len(ids) == len(set(ids))


def test_nothing_to_score_is_said(page):
    assert "There was nothing to score." in page({**METRICS, "table": []}, rows=[], ecgs={}).text


TEXT = st.one_of(st.none(), st.text(max_size=5))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.fixed_dictionaries({"question": TEXT, "site": TEXT, "prediction": st.text(max_size=5), "controls": st.dictionaries(st.text(), st.text())})))
def test_packed_cases_say_what_the_rows_say(rows):
    rows = [{**ROWS[0], **row, "id": str(i)} for i, row in enumerate(rows)]
    packed = json.loads(json.dumps(packed_cases(rows, {})))
    assert len(packed["rows"]) == len(rows) and len(set(packed["texts"])) == len(packed["texts"])
    for row, values in zip(rows, packed["rows"]):
        read = dict(zip(packed["fields"], values, strict=True))
        text = [None if place is None else packed["texts"][place] for place in (read["question"], read["site"], read["prediction"])]
        assert text == [row["question"] or None, row["site"] or None, row["prediction"]]
        assert [[packed["texts"][i] for i in pair] for pair in read["controls"]] == [list(pair) for pair in row["controls"].items()]
        assert (read["id"], read["task"], read["loglik"], read["score"]) == (row["id"], "ecgqa", -0.5, None)


def test_questions_are_right_or_wrong_and_reports_have_rouge():
    packed = packed_cases([ROWS[0], {**ROWS[0], "prediction": " YES"}, ROWS[1]], {})
    judged = [dict(zip(packed["fields"], values)) for values in packed["rows"]]
    assert [(one["correct"], one["score"]) for one in judged] == [(False, None), (True, None), (None, 0.5)]  # one word of two, both ways


@settings(max_examples=50, deadline=None)
@given(hnp.arrays(np.float32, (2, 12, 5), elements=st.floats(-170, 170, width=32)))
def test_packed_ecgs_hold_their_samples_within_half_a_step(arrays):
    packed = packed_ecg({**ECG, "signal": arrays[0], "reconstruction": arrays[1]})
    planes = zlib.decompress(base64.b64decode(packed["data"]))
    assert len(planes) == 2 * 2 * 12 * 5 and packed["arrays"] == ["signal", "reconstruction"]
    for at, array in enumerate(arrays):  # sample by sample, as the format is written down
        for lead in range(12):
            value = 0
            for i in range(5):
                low = at * 120 + lead * 5 + i
                zigzag = planes[low] + 256 * planes[low + 60]
                value += -(zigzag + 1) // 2 if zigzag % 2 else zigzag // 2
                value = (value + 2**15) % 2**16 - 2**15
                wanted = np.clip(array[lead, i], -(2**15) * STEP, (2**15 - 1) * STEP)
                assert abs(value * STEP - wanted) <= STEP / 2 + 1e-4


def test_an_ecg_without_a_recording_has_its_reconstruction_alone():
    packed = packed_ecg({**ECG, "signal": None, "reconstruction": ECG["signal"]})
    assert packed["arrays"] == ["reconstruction"] and packed["samples"] == 2500 and packed["tokens"] == list(range(313))
