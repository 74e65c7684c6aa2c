"""report.html in headless Chromium: what a reader can do with it. What stands in the file is tested in test_html_report.py."""

import io
import time
from urllib.parse import parse_qs, quote, urlsplit

import numpy as np
import pytest
from PIL import Image

from toolkit.ecg.leads import LEADS
from toolkit.evaluation.html_report import write_report

KINDS = ("single-verify", "single-choose", "single-query")
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, 1296, 313).astype(np.uint16)
LINE = {
    "section": "ECG-QA", "score": "exact_match", "label": "Exact match", "level": "all", "of": "all", "n": 250, "patients": 40,
    "values": {"model": 0.5, "shuffled": 0.25}, "interval": [0.4, 0.6], "differences": {"shuffled": {"difference": 0.25, "low": 0.1, "high": 0.4}},
}  # fmt: skip
METRICS = {"columns": ["model", "shuffled"], "table": [LINE], "notes": [], "conventions": {}}
ATTACK = '</script><img src=x onerror="window.harmed=1"><script>window.harmed=1</script><!--'
STEPS = np.arange(-6, 6) / 4  # mV: the constant that each lead of the first ECG has


def made_rows(n):
    rows = []
    for i in range(n):
        if i % 10 == 9:
            row = {"id": f"r{i}", "task": "report", "question_type": "report", "reference": "sinus rhythm.", "prediction": ""}
            rows.append({**row, "sample": i // 5})
            continue
        kind = {"task": "ecgqa", "question_type": KINDS[i % 3], "attribute_type": ["scp_code", "noise"][i % 2], "template_id": i % 7}
        rows.append({
            **kind, "id": f"q{i}", "sample": i // 5, "question": f"Does ECG {i} show symptoms?", "reference": "yes", "prediction": ["yes", "no"][i % 4 == 0],
            "correct": i % 4 != 0, "loglik": -(i * 37 % 101) / 10, "labels": ["NORM"] if i % 6 else ["AFIB", "LVH"], "site": str(i % 3),
            "controls": {"shuffled": f"control {i}", "flat": ""},
        })  # fmt: skip
    rows[1] |= {"question": ATTACK, "prediction": ATTACK, "controls": {ATTACK: ATTACK}, "labels": [ATTACK], "correct": False}
    return rows  # "correct" is for the tests alone: the report finds out for itself


def made_ecg(signal, unit="mV", reconstruction=None):
    signal, reconstruction = (None if one is None else np.broadcast_to(one[:, None], (12, 2500)).astype(np.float32) for one in (signal, reconstruction))
    arrays = {"signal": signal, "reconstruction": reconstruction, "tokens": TOKENS}
    return {"title": "ECG 5", "note": "a note", "fs": 250, "unit": unit, "levels": [6, 6, 6, 6], **arrays}


ROWS = made_rows(250)
ECGS = {0: [made_ecg(STEPS, reconstruction=STEPS + 0.4)], 1: [made_ecg(STEPS, "SD"), made_ecg(None, reconstruction=STEPS)], 49: [made_ecg(STEPS)]}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(path, METRICS, ROWS, ECGS, {"model": "a"})
    return path


@pytest.fixture
def page(opens, report):
    """page(hash="", path=report) -> the page, when its script is through."""
    return lambda hash="", path=report: opens(path, hash, "html[data-ready]")


def ids(page):
    return page.locator("#rows tr").evaluate_all("rows => rows.map(row => row.dataset.id)")


def fragment(page):
    return {name: value for name, (value,) in parse_qs(urlsplit(page.url).fragment).items()}


def opened(page, row=0):
    """Opens a case of the list; returns the first canvas when it is drawn."""
    page.locator("#rows tr").nth(row).click()
    page.wait_for_selector("canvas[data-scale]")
    return page.locator("canvas").first


def picture(canvas):
    return np.array(Image.open(io.BytesIO(canvas.screenshot())).convert("RGB")).astype(int)


def at(picture, x, y):
    """The darkest pixel within half a millimetre of (x, y) mm, of a whole page of 280 mm."""
    scale = picture.shape[1] / 280
    column, row, reach = round(x * scale), round(y * scale), round(scale / 2)
    patch = picture[row - reach : row + reach + 1, column - reach : column + reach + 1].reshape(-1, 3)
    return patch[patch.sum(-1).argmin()]


def test_filters_narrow_the_list_and_the_address_keeps_them(page):
    shown = page()
    right = sum(row.get("correct", False) for row in ROWS)
    assert shown.locator("#count").inner_text() == f"250 of 250 cases, {right} of 225 questions right ({100 * right / 225:.1f} %)"
    labels = [label for row in ROWS for label in row.get("labels", [])]  # a choice says how many cases it has
    assert shown.locator("#label option").all_inner_texts()[1:3] == [f"{name} ({labels.count(name)})" for name in ("NORM", "AFIB")]
    shown.select_option("#type", "single-query")
    shown.select_option("#result", "wrong")
    shown.select_option("#label", "AFIB")
    wanted = [row["id"] for row in ROWS if row["question_type"] == "single-query" and row.get("correct") is False and "AFIB" in row["labels"]]
    assert ids(shown) == wanted
    shown.select_option("#label", "")
    shown.select_option("#site", "2")
    shown.fill("#text", "ECG 2")
    wanted = [row for row in ROWS if row["question_type"] == "single-query" and row["correct"] is False and row["site"] == "2"]
    wanted = [row["id"] for row in wanted if "ecg 2" in row["question"].lower()]
    assert ids(shown) == wanted != []
    assert shown.locator("#count").inner_text() == f"{len(wanted)} of 250 cases, 0 of {len(wanted)} questions right (0.0 %)"
    assert fragment(shown) == {"type": "single-query", "result": "wrong", "site": "2", "text": "ECG 2"}
    shown.reload()
    shown.wait_for_selector("html[data-ready]")
    assert ids(shown) == wanted and shown.input_value("#text") == "ECG 2" and shown.input_value("#type") == "single-query"
    shown.get_by_role("button", name="Show all").click()
    assert len(ids(shown)) == 100 and fragment(shown) == {}


def test_every_column_sorts_both_ways_by_keyboard(page):
    shown = page()
    for name in shown.locator("#heads th").evaluate_all("heads => heads.map(head => head.dataset.name)"):
        head = shown.locator(f'#heads th[data-name="{name}"]')
        orders = []
        for said in ("ascending", "descending", "none"):
            head.locator("button").focus()
            shown.keyboard.press("Enter")
            assert head.get_attribute("aria-sort") == said
            orders.append(ids(shown))
        assert orders[2] == [row["id"] for row in ROWS[:100]]
        if name == "loglik":
            known = [row for row in ROWS if "loglik" in row]
            assert orders[0] == [row["id"] for row in sorted(known, key=lambda row: row["loglik"])][:100]
            assert orders[1] == [row["id"] for row in sorted(known, key=lambda row: -row["loglik"])][:100]
        if name == "question":
            assert orders[0][:4] == ["q1", "q0", "q2", "q3"] and orders[1][25] == "q248"  # 10 comes after 2; q1 is the attack, and 25 are reports


def test_pages_of_a_hundred(page):
    shown = page()
    assert len(ids(shown)) == 100 and shown.locator("#range").inner_text() == "1 to 100 of 250" and shown.locator("#previous").is_disabled()
    shown.click("#next")
    shown.click("#next")
    assert ids(shown) == [row["id"] for row in ROWS[200:]] and shown.locator("#next").is_disabled()
    shown.fill("#text", "no such words")
    assert ids(shown) == [] and shown.locator("#range").inner_text() == "no case is like this"


def test_a_case_opens_by_keyboard_shows_all_answers_and_closes(page):
    shown = page()
    shown.get_by_role("button", name="open case 3", exact=True).focus()
    shown.keyboard.press("Enter")
    text = shown.locator("dialog").inner_text()
    assert "Case 3" in text and "Does ECG 2 show symptoms?" in text and "✓ right" in text and "template 2" in text
    assert "control 2" in text and "(empty)" in text and "NORM" in text and "−7.400 (probability 0.000611)" in text
    assert fragment(shown) == {"case": "q2"}
    shown.get_by_role("button", name="next case").click()
    assert shown.locator("#case-title").inner_text() == "Case 4"
    shown.locator("details.others summary").click()
    assert shown.locator("details.others li").count() == 4  # of the same ECG
    shown.keyboard.press("Escape")
    shown.wait_for_function("!document.getElementById('case').open")
    assert fragment(shown) == {}


def test_the_address_opens_a_filtered_list_with_a_case(page):
    shown = page("#" + "type=single-choose&sort=-loglik&case=q1&attribute=" + quote("scp_code"))
    assert shown.locator("#case-title").inner_text() == "Case 2" and shown.input_value("#attribute") == "scp_code"
    chosen = [row for row in ROWS if row["question_type"] == "single-choose" and row["attribute_type"] == "scp_code"]
    assert ids(shown)[0] == max(chosen, key=lambda row: row["loglik"])["id"]
    shown = page("#type=of another report&case=gone")
    assert len(ids(shown)) == 100 and not shown.locator("dialog").is_visible()


def test_the_trace_is_true_to_scale_and_the_overlay_can_be_hidden(page):
    shown = page()
    canvas = opened(shown)
    drawn = picture(canvas)
    for row, leads in enumerate((("I", "aVR", "V1", "V4"), ("II", "aVL", "V2", "V5"), ("III", "aVF", "V3", "V6"))):
        for column, lead in enumerate(leads):  # the middle of each column of 2.5 s at 25 mm/s, 10 mm/mV
            x, y = 20 + (column + 0.5) * 62.5 + 1.25, 25 + 35 * row - 10 * STEPS[LEADS.index(lead)]
            assert at(drawn, x, y).max() < 120, lead
    blue = lambda drawn: int(((drawn[..., 2] > 180) & (drawn[..., 0] < 120)).sum())
    strip = drawn.shape[0] * 148 // 157  # the tokens below the grid are of all colours
    assert blue(drawn[:strip]) > 500
    toggle = shown.get_by_role("button", name="Reconstruction")
    toggle.click()
    assert toggle.get_attribute("aria-pressed") == "false" and blue(picture(canvas)[:strip]) == 0
    toggle.click()
    assert blue(picture(canvas)[:strip]) > 500


def test_zoom_by_wheel_buttons_and_keys_and_pan(page):
    shown = page()
    canvas = opened(shown)
    scale = lambda: float(canvas.get_attribute("data-scale"))
    whole = picture(canvas)
    assert scale() == 1
    canvas.hover(position={"x": 300, "y": 200})
    shown.mouse.wheel(0, -200)
    shown.wait_for_function("document.querySelector('canvas').dataset.scale > 1.4")
    zoomed = picture(canvas)
    assert not np.array_equal(zoomed, whole)
    shown.mouse.down()
    shown.mouse.move(360, 400, steps=3)
    shown.mouse.up()
    assert not np.array_equal(picture(canvas), zoomed)
    before = scale()
    shown.get_by_role("button", name="zoom in").click()
    assert scale() == pytest.approx(1.5 * before, rel=0.01)
    canvas.focus()
    shown.keyboard.press("-")
    assert scale() == pytest.approx(before, rel=0.01)
    shown.get_by_role("button", name="the whole ECG").click()
    shown.mouse.move(5, 5)
    assert scale() == 1 and np.array_equal(picture(canvas), whole)


def test_calipers_measure_what_the_paper_says(page):
    shown = page()
    canvas = opened(shown)
    canvas.scroll_into_view_if_needed()
    shown.get_by_role("button", name="Calipers").click()
    readout = shown.locator(".readout")
    assert readout.inner_text() == "1000 ms · 60 bpm · 1.00 mV"
    box = canvas.bounding_box()
    mm = box["width"] / 280
    x, y = box["x"] + 152.5 * mm, box["y"] + 5.5 * mm  # the second line stands 12.5 mm right of the middle; drag it 12.5 mm on
    shown.mouse.move(x, y)
    shown.mouse.down()
    shown.mouse.move(x + 12.5 * mm, y, steps=4)
    shown.mouse.up()
    ms, bpm, high = (part.split()[0] for part in readout.inner_text().split(" · "))
    assert abs(int(ms) - 1500) <= 10 and abs(int(bpm) - 40) <= 1 and high == "1.00"
    canvas.focus()
    shown.keyboard.press("ArrowRight")
    assert abs(int(readout.inner_text().split()[0]) - int(ms) - 4) <= 1  # one sample at 250 Hz
    shown.keyboard.press("c")
    shown.keyboard.press("ArrowDown")
    assert readout.inner_text().endswith("1.01 mV")  # the lower line, 0.1 mm down
    shown.get_by_role("button", name="Calipers").click()
    assert readout.inner_text() == ""


def test_the_token_strip_says_id_and_digits(page):
    shown = page()
    canvas = opened(shown)
    canvas.scroll_into_view_if_needed()
    scale = canvas.bounding_box()["width"] / 280
    for i in (0, 100, 312):
        canvas.hover(position={"x": (20 + (i + 0.5) * 0.8) * scale, "y": (145 + 6) * scale})
        digits = " ".join(str(TOKENS[i] // 6**place % 6) for place in range(4))
        assert shown.locator(".readout").inner_text() == f"token {i + 1} of 313: id {TOKENS[i]}, digits {digits}, {0.032 * i:.2f} s"


def test_a_comparison_shows_both_ecgs_in_their_units_and_layouts_change(page):
    shown = page()
    opened(shown, 5)
    shown.wait_for_function("document.querySelectorAll('canvas[data-scale]').length === 2")
    captions = shown.locator("figcaption").all_inner_texts()
    assert "2.5 mm/SD" in captions[0] and "voltages are lost" in captions[0] and "10 mm/mV" in captions[1]
    assert shown.get_by_role("button", name="Reconstruction").count() == 0  # of neither there is a pair to compare
    height = shown.locator("canvas").first.bounding_box()["height"]
    shown.get_by_role("button", name="other layout").first.click()
    assert shown.locator("canvas").first.bounding_box()["height"] > 1.5 * height


def test_a_case_without_an_ecg_says_so(page):
    shown = page("#case=q12")
    assert "is not in this file, which holds 3 of them; the filter “ECG” lists" in shown.locator("dialog").inner_text() and shown.locator("canvas").count() == 0
    shown.keyboard.press("Escape")
    shown.locator("#ecg").select_option("drawn")
    assert ids(shown) == [row["id"] for row in ROWS if row["sample"] in ECGS]
    shown.locator("#ecg").select_option("not drawn")
    assert shown.locator("#count").inner_text().startswith(f"{len(ROWS) - 15} of 250 cases")


def test_an_answer_without_an_end_leaves_the_ecg_in_sight(page, tmp_path):
    rows = [{**ROWS[0], "controls": {"flat": "hypertrophy " * 400}}]
    write_report(tmp_path / "report.html", METRICS, rows, {0: ECGS[0]}, {})
    assert opened(page(path=tmp_path / "report.html")).bounding_box()["y"] < 450


def test_what_a_model_says_harms_nobody(page):
    shown = page("#case=q1")
    assert ATTACK in shown.locator("dialog").inner_text() and shown.locator("img").count() == 0
    assert shown.evaluate("window.harmed") is None
    shown.evaluate("document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.harmed = 1'}))")
    shown.evaluate("document.body.append(Object.assign(document.createElement('img'), {src: 'https://example.org/x.png'}))")
    shown.wait_for_timeout(100)
    assert shown.evaluate("window.harmed") is None
    assert len(shown.said) == 2 and all("Content Security Policy" in said for said in shown.said)  # both were refused
    shown.said.clear()
    assert [url for url in shown.asked if url.startswith("http")] == ["https://example.org/x.png"]  # asked of the browser, which sent nothing
    shown.asked.pop()


def test_a_phone_shows_a_part_that_can_be_read(page):
    shown = page()
    shown.set_viewport_size({"width": 400, "height": 800})
    canvas = opened(shown)
    assert float(canvas.get_attribute("data-scale")) > 1.5  # 2.4 pixels a millimetre
    assert shown.evaluate("document.documentElement.scrollWidth") == 400


def test_two_thousand_cases(page, tmp_path):
    write_report(tmp_path / "report.html", METRICS, made_rows(2000), {i: [ECGS[0][0]] for i in range(100)}, {"model": "a"})
    page()  # so that the browser's own start does not count
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        shown = page(path=tmp_path / "report.html")
        seconds.append(time.perf_counter() - started)
    print(f"2,000 cases loaded in {min(seconds):.2f} to {max(seconds):.2f} s")
    assert min(seconds) < 2  # the best, because the machine may be busy with something else
    assert shown.locator("#count").inner_text().startswith("2,000 of 2,000 cases") and len(ids(shown)) == 100
