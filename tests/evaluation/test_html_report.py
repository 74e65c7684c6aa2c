"""The page is parsed, not searched: what a reader sees, what a browser would fetch, what a screen reader says."""

import base64
import copy
import re
from html.parser import HTMLParser

import pytest

from toolkit.evaluation.html_report import write_report

PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNkYAAAAAYAAjCB0C8AAAAASUVORK5CYII=")
VOID = {"meta", "img", "rect", "line", "link", "br", "hr", "input"}

METRICS = {
    "exact_match": {"overall": 0.55, "single-verify": 0.7312, "single-choose": None, "single-query": 0.289},
    "counts": {"single-verify": 41093, "single-choose": 0, "single-query": 22823},
    "report": {"bleu_1": 0.411, "bleu_2": 0.372, "bleu_3": 0.353, "bleu_4": 0.336, "rouge_l": 0.512, "n": 4321},
    "blind": {
        "exact_match": {"overall": 0.4713, "single-verify": 0.677, "single-choose": None, "single-query": 0.301},
        "report": {"bleu_1": 0.211, "bleu_2": 0.152, "bleu_3": 0.093, "bleu_4": 0.34, "rouge_l": 0.398},
    },
}
QUESTION = {
    "question_type": "single-verify", "question": "Is this normal?", "reference": "yes", "prediction": "no",
    "blind": "yes", "correct": False,
}  # fmt: skip
SAMPLE = {
    "key": "ptbxl-00001",
    "title": "First ECG",
    "png": PNG,
    "questions": [QUESTION, {**QUESTION, "prediction": "yes", "correct": True}],
    "report": {"reference": "sinus rhythm.", "prediction": "atrial fibrillation."},
}
INFO = {"model": "runs/a & b", "shards": ["one", "two"], "ECGs": 3214, "commit": "e580089", "adapter": None, "lr": 1e-4}


class Page(HTMLParser):
    """Elements with their attributes, table rows as text, all visible text; fails on unbalanced tags."""

    def __init__(self, source):
        super().__init__()
        self.elements, self.open, self.rows, self.text = [], [], [], []
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open or not data.strip():
            return
        self.text.append(data.strip())
        if "th" in self.open or "td" in self.open:
            self.rows[-1][-1] += data.strip()

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture
def page(tmp_path):
    def render(metrics=METRICS, samples=(SAMPLE,), info=INFO):
        write_report(tmp_path / "report.html", metrics, list(samples), info)
        return Page((tmp_path / "report.html").read_text(encoding="utf-8"))

    return render


def test_every_number_stands_in_its_table(page):
    rows = page().rows
    assert ["All questions", "63,916", "55.0", "47.1", "+7.9"] in rows
    assert ["single-verify", "41,093", "73.1", "67.7", "+5.4"] in rows
    assert ["single-choose", "0", "–", "–", "–"] in rows
    assert ["single-query", "22,823", "28.9", "30.1", "−1.2"] in rows
    assert ["BLEU-1", "41.1", "21.1", "+20.0"] in rows and ["BLEU-2", "37.2", "15.2", "+22.0"] in rows
    assert ["BLEU-3", "35.3", "9.3", "+26.0"] in rows and ["BLEU-4", "33.6", "34.0", "−0.4"] in rows
    assert ["ROUGE-L", "51.2", "39.8", "+11.4"] in rows
    assert "4,321 reports" in " ".join(page().text)


def test_info_is_shown_in_order_and_readable(page):
    assert page().rows[:6] == [
        ["model", "runs/a & b"], ["shards", "one, two"], ["ECGs", "3,214"], ["commit", "e580089"], ["adapter", "–"],
        ["lr", "0.0001"],
    ]  # fmt: skip


def test_cards_show_the_ecg_and_say_in_words_what_is_right(page):
    shown = page()
    text = " ".join(shown.text)
    assert shown.text.count("✗ wrong") == 1 and shown.text.count("✓ right") == 1
    assert "1 of 2 questions right" in text and "Is this normal?" in text
    assert "sinus rhythm." in shown.text and "atrial fibrillation." in shown.text
    (image,) = shown.all("img")
    assert base64.b64decode(image["src"].removeprefix("data:image/png;base64,")) == PNG
    assert "ptbxl-00001" in image["alt"] and "First ECG" in image["alt"]


def test_bars_have_the_length_of_the_score_and_a_mark_at_the_baseline(page):
    models = [rect["width"] for rect in page().all("rect") if rect["class"] == "model"]
    assert models[:3] == ["55.00%", "73.12%", "28.90%"]
    marks = [line["x1"] for line in page().all("line")]
    assert marks[:3] == ["47.13%", "67.70%", "30.10%"]
    assert [svg["aria-label"] for svg in page().all("svg")][0] == "model 55.0, blind 47.1 of 100"


def test_what_a_model_wrote_is_text_never_markup(page):
    attack = "<script>alert('x')</script><img src=http://evil/>"
    hostile = copy.deepcopy(SAMPLE)
    hostile |= {"title": attack + '"', "key": 'k" onerror="x'}
    hostile["questions"][0] |= {"prediction": attack, "question": attack, "reference": attack, "blind": attack}
    hostile["report"] = {"reference": attack, "prediction": attack}
    shown = page(samples=[hostile], info={attack: attack})
    assert not shown.all("script") and len(shown.all("img")) == 1 and "onerror" not in shown.all("img")[0]
    assert shown.text.count(attack) >= 8


def test_nothing_is_fetched(page, tmp_path):
    shown = page()
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|//\w|@import|url\(", re.sub(r"base64,[^\"]*", "", source))
    assert not {"script", "link", "iframe", "object"} & {name for name, _ in shown.elements}
    references = [
        a[name] for _, a in shown.elements for name in ("src", "href", "srcset", "data", "action") if name in a
    ]
    assert all(reference.startswith("data:image/png;base64,") for reference in references)


def test_the_page_is_accessible_and_says_what_it_is_not(page):
    shown = page()
    assert shown.text.count("Research software. Not a medical device; not for diagnosis.") >= 1
    assert shown.all("html")[0]["lang"] == "en" and any("viewport" == meta.get("name") for meta in shown.all("meta"))
    assert all(header.get("scope") in ("row", "col") for header in shown.all("th"))
    assert all(image["alt"] for image in shown.all("img")) and len(shown.all("h1")) == 1
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in shown.all("svg"))


def test_a_split_without_questions_or_reports_says_so(page):
    empty = {
        "exact_match": dict.fromkeys(METRICS["exact_match"]),
        "counts": dict.fromkeys(METRICS["counts"], 0),
        "report": dict.fromkeys(METRICS["report"]) | {"n": 0},
    }
    empty["blind"] = {"exact_match": empty["exact_match"], "report": empty["report"]}
    shown = page(metrics=empty, samples=[])
    assert {"This split holds no questions.", "This split holds no reports."} <= set(shown.text)
    assert "Examples" not in shown.text and not shown.all("svg")


def test_a_card_without_questions_report_or_answer(page):
    bare = {**SAMPLE, "questions": [], "report": None}
    silent = {**SAMPLE, "questions": [{**QUESTION, "prediction": ""}], "report": {"reference": "a", "prediction": ""}}
    shown = page(samples=[bare, silent])
    assert shown.text.count("(empty)") == 2 and len(shown.all("article")) == 2


def test_a_loss_too_small_to_show_is_no_loss(page):
    metrics = copy.deepcopy(METRICS)
    metrics["exact_match"]["overall"] = metrics["blind"]["exact_match"]["overall"] - 1e-5
    assert ["All questions", "63,916", "47.1", "47.1", "+0.0"] in page(metrics=metrics).rows
