import json
import re

import numpy as np
import pytest
import wfdb
from scipy.stats import spearmanr
from sklearn.metrics import cohen_kappa_score

from sharding.manifest import SCHEMA, write_manifest
from toolkit.ecg.leads import LEADS
from toolkit.errors import UserError
from toolkit.evaluation import study
from toolkit.shards.writer import write_index, write_split

CRITERIA = ("accuracy", "completeness", "actionability")
NASTY = "</script><img src=x onerror=alert(1)> lvh & \u2028 <b>"


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def rows(predictions, **more):
    return [
        {"id": f"r{i}", "task": "report", "reference": f"sinus rhythm, reference {i}", "prediction": text, "patient": i, **more}
        for i, text in enumerate(predictions)
    ]


@pytest.fixture
def made(tmp_path):
    """A study of two systems and six cases: its folder and key."""
    first = write(tmp_path / "P.jsonl", rows([NASTY, "", "lvh", "sinus rhythm", "sinus rhythm, reference 4", "wpw"]))
    second = write(tmp_path / "Q.jsonl", rows([f"another {i}" for i in range(6)]))
    study.main(["make", "--predictions", first, "--other", second, "--out", str(tmp_path / "study")])
    return tmp_path / "study", study.read_key(tmp_path / "study")


def export(key, path, rater, rate, change=None):
    """Write what a rater exports; rate(case, source) -> the three ratings or None."""
    ratings = []
    for number, case in enumerate(key["cases"], 1):
        for i, (source, _) in enumerate(case["texts"]):
            if (given := rate(number - 1, source)) is not None:
                ratings.append({"case": number, "text": "ABC"[i], "comment": "", **dict(zip(CRITERIA, given))})
    path.write_text(json.dumps({"format": key["format"], "study": key["study"], "rater": rater, "ratings": ratings} | (change or {})))
    return path


def test_the_page_shows_every_text_and_not_whose_it_is(made):
    folder, key = made
    page = (folder / "study.html").read_text()
    data = json.loads(re.search(r'id="data">(.*?)</script>', page)[1])
    assert data["study"] == key["study"]
    assert [case["texts"] for case in data["cases"]] == [[text for _, text in case["texts"]] for case in key["cases"]]
    assert set(data["cases"][0]) == {"png", "texts"}
    for hidden in (*key["sources"][1:], *(f'"{case["id"]}"' for case in key["cases"]), ".jsonl", "http:", "https:"):
        assert hidden not in page
    assert "default-src 'none'" in page
    assert "not for diagnosis" in page
    assert "No ECG is drawn" in page
    assert page.count("<script") == 2 and page.count("</script>") == 2  # NASTY stays inside its string


def test_the_key_says_whose_the_texts_are(made):
    folder, key = made
    assert key["sources"][0] == "reference"
    assert key["sources"] == ["reference", "P.jsonl", "Q.jsonl"]
    assert sorted(case["id"] for case in key["cases"]) == [f"r{i}" for i in range(6)]
    for case in key["cases"]:
        texts, i = dict(case["texts"]), int(case["id"][1])
        assert texts[0] == f"sinus rhythm, reference {i}"
        assert texts[2] == f"another {i}"


def test_orders_are_random_and_the_seed_repeats_them(tmp_path):
    given = write(tmp_path / "P.jsonl", rows([f"text {i}" for i in range(60)]))
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        study.main(["make", "--predictions", given, "--out", str(tmp_path / name), "--cases", "40", "--seed", seed])
    keys = {name: study.read_key(tmp_path / name) for name in "abc"}
    assert keys["a"] == keys["b"] != keys["c"]
    assert keys["a"]["study"] != keys["c"]["study"]
    assert (keys["a"]["seed"], keys["c"]["seed"]) == (0, 1)
    first = [case["texts"][0][0] for case in keys["a"]["cases"]]
    assert len(first) == 40 and 10 <= sum(first) <= 30


def test_without_a_seed_nobody_can_work_out_the_orders(tmp_path):
    given = write(tmp_path / "P.jsonl", rows([f"text {i}" for i in range(30)]))
    keys = []
    for name in "ab":
        study.main(["make", "--predictions", given, "--out", str(tmp_path / name)])
        keys.append(study.read_key(tmp_path / name))
        assert str(keys[-1]["seed"]) not in (tmp_path / name / "study.html").read_text()
    assert keys[0]["seed"] != keys[1]["seed"] and keys[0]["cases"] != keys[1]["cases"]
    assert [case["id"] for case in keys[0]["cases"]] != [case["id"] for case in keys[1]["cases"]]
    # the key's seed is what the orders hang on
    study.main(["make", "--predictions", given, "--out", str(tmp_path / "c"), "--seed", str(keys[0]["seed"])])
    assert study.read_key(tmp_path / "c") == keys[0]


def test_sources_are_called_by_the_end_of_their_path(tmp_path):
    paths = [tmp_path / part / "evaluate" / "predictions.jsonl" for part in ("a", "b")] + [tmp_path / "reference"]
    assert study.short_names(paths) == ["a/evaluate/predictions.jsonl", "b/evaluate/predictions.jsonl", f"{tmp_path.name}/reference"]
    assert study.short_names(paths[:1]) == ["predictions.jsonl"]
    assert study.short_names([tmp_path / "P", tmp_path / "x" / "P"]) == [f"{tmp_path.name}/P", "x/P"]


def test_one_report_of_a_patient(tmp_path):
    several = [{**row, "patient": i // 3} for i, row in enumerate(rows(["x"] * 9))]
    study.main(["make", "--predictions", write(tmp_path / "P.jsonl", several), "--out", str(tmp_path / "s")])
    ids = [int(case["id"][1:]) for case in study.read_key(tmp_path / "s")["cases"]]
    assert sorted(i // 3 for i in ids) == [0, 1, 2]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda f: {"predictions": write(f / "Q.jsonl", rows(["no"], task="ecgqa"))}, "--predictions: .*Q.jsonl holds no reports"),
        (lambda f: {"predictions": str(f / "none.jsonl")}, "--predictions: .*none.jsonl"),
        (lambda f: {"other": write(f / "Q.jsonl", rows(["a"], id="z"))}, "--other: no id"),
        (lambda f: {"other": write(f / "Q.jsonl", [{**row, "reference": "lvh"} for row in rows(["a"])])}, "--other: .*Q.jsonl has another reference than .*r0"),
        (lambda f: {"other": str(f / "P.jsonl")}, "--other: every file once"),
        (lambda f: {"other": str(f / "x" / ".." / "P.jsonl")}, "--other: every file once"),
        (lambda f: {"cases": "0"}, "--cases: at least 1"),
        (lambda f: {"out": str(f)}, "--out: .* is not empty"),
        (lambda f: {"shards": str(f)}, "--shards"),
    ],
)  # fmt: skip
def test_mistakes_are_named(tmp_path, change, message):
    options = {"predictions": write(tmp_path / "P.jsonl", rows(["a", "b"])), "out": str(tmp_path / "s"), **change(tmp_path)}
    with pytest.raises(UserError, match=message):
        study.main(["make", *(part for name, value in options.items() for part in (f"--{name}", value))])
    assert not (tmp_path / "s").exists()


@pytest.fixture
def recorded(tmp_path):
    """Task shards of two recordings, in mV and z-scored, with the reports r0 and r1; their predictions."""
    blank = {"start": 0.0, "array": "", "report": "", "labels": [], "qc": [], "age": 50.0, "sex": "", "site": "", "split": "test", "source": "ours"}
    lines, samples, wave = [], [], np.sin(np.arange(5000) / 50)[:, None] * np.ones(12)
    for i, ecg in enumerate((wave, wave / wave.std())):
        wfdb.wrsamp(f"r{i}", fs=500, units=["mV"] * 12, sig_name=list(LEADS), p_signal=ecg, fmt=["16"] * 12, write_dir=str(tmp_path))
        line = {**blank, "key": f"x_{i}", "record_id": f"number{i}", "patient": "p", "path": str(tmp_path / f"r{i}")}
        lines.append({name: line[name] for name in SCHEMA.names})
        meta = {"source": "ours", "record_ids": [f"number{i}"], "tasks": [{"id": f"r{i}", "task": "report"}]}
        samples.append((f"s_{i}", np.zeros((1, 313), np.uint16), meta))
    (tmp_path / "manifest").mkdir()
    write_manifest(tmp_path / "manifest", lines, [], {})
    (tmp_path / "tasks").mkdir()
    write_index(tmp_path / "tasks", {"test": write_split(tmp_path / "tasks", "test", samples, 4)}, kind="tasks", codes=1296, manifest="../manifest")
    return ["make", "--shards", str(tmp_path / "tasks"), "--out", str(tmp_path / "s"), "--predictions"]


def test_the_ecgs_are_drawn_from_their_recordings(recorded, tmp_path, browser, monkeypatch):
    drawn, draw_ecg = [], study.draw_ecg
    monkeypatch.setattr(study, "draw_ecg", lambda ecg, picture, **how: (drawn.append((ecg.std(), how)), draw_ecg(ecg, picture, **how)))
    study.main([*recorded, write(tmp_path / "P.jsonl", [{**row, "sample": i} for i, row in enumerate(rows(["a", "b"]))])])
    assert {how["unit"]: round(float(std), 2) for std, how in drawn} == {"mV": 0.71, "SD": 1.0}
    assert all("title" not in how for _, how in drawn)
    assert not re.search("number[01]", (tmp_path / "s" / "study.html").read_text())
    page = browser.new_page()
    page.goto((tmp_path / "s" / "study.html").as_uri())
    page.wait_for_function("document.querySelector('#ecg').naturalWidth > 1000")
    assert "No ECG is drawn" not in page.content()
    page.close()


def test_a_study_draws_no_ecg_but_the_patients_own(recorded, tmp_path):
    with pytest.raises(UserError, match="--shards: id 'r0' is not in sample 1 of its split 'test'"):
        study.main([*recorded, write(tmp_path / "P.jsonl", rows(["a"], sample=1))])
    (tmp_path / "r0.dat").unlink()
    with pytest.raises(UserError, match="--shards: the recording of sample 0 is not at hand"):
        study.main([*recorded, write(tmp_path / "P.jsonl", rows(["a"], sample=0))])


def test_the_scores_are_those_of_the_ratings(made, tmp_path, capsys):
    folder, key = made
    rng = np.random.default_rng(0)
    given = rng.integers(1, 6, (2, 6, 3, 3))
    missing = {(0, 2, 1), (1, 2, 1), (1, 4, 0)}  # rater, case, source
    paths = [export(key, tmp_path / f"{r}.json", f"rater {r}", lambda c, s, r=r: None if (r, c, s) in missing else given[r, c, s].tolist()) for r in (0, 1)]
    found = study.score(key, paths)
    values = given.astype(float)
    for place in missing:
        values[place] = np.nan
    each = np.nanmean(np.delete(values, 2, axis=1), 0)  # without the case that has a text nobody rated
    assert (found["cases"], found["raters"], found["rated"]) == (6, 2, 17)
    assert found["means"]["reference"]["accuracy"]["value"] == pytest.approx(np.nanmean(values[:, :, 0, 0], 0).mean())
    for i, source in enumerate(key["sources"][1:], 1):
        difference = found["differences"][source]["completeness"]
        every = np.nanmean(values[:, :, [0, i], 1], 0) if i == 2 else each[:, [0, i], 1]
        assert difference["value"] == pytest.approx((every[:, 1] - every[:, 0]).mean())
        assert difference["low"] <= difference["value"] <= difference["high"]
        assert difference["n"] == (6 if i == 2 else 5)
    first, second = values[..., 2].reshape(2, -1)
    both = ~np.isnan(first + second)
    kappa = cohen_kappa_score(first[both].astype(int), second[both].astype(int), weights="quadratic", labels=[1, 2, 3, 4, 5])
    assert found["agreement"]["actionability"]["kappa"]["value"] == pytest.approx(kappa)
    assert found["agreement"]["actionability"]["alpha"]["n"] == both.sum() == 16
    automatic = study.automatic_scores(key)
    assert set(found["correlations"]) == set(automatic) >= {"f1", "rouge_l", "bleu_4_corpus"}
    rouge, ratings = automatic["rouge_l"], np.where(np.isnan(values).all(0), np.nan, np.nan_to_num(values).sum(0) / np.maximum((~np.isnan(values)).sum(0), 1))
    x, y = rouge.ravel(), ratings[:, 1:, 0].ravel()
    assert found["correlations"]["rouge_l"]["accuracy"]["value"] == pytest.approx(spearmanr(x[~np.isnan(y)], y[~np.isnan(y)]).statistic)
    study.main(["score", "--study", str(folder), "--exports", *map(str, paths)])
    text = capsys.readouterr().out
    assert "Between raters" in text and "not for diagnosis" in text
    study.main(["score", "--study", str(folder), "--json", "--exports", *map(str, paths)])
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(found))


def test_an_automatic_score_is_of_the_report_alone(made):
    key = made[1]
    scores = study.automatic_scores(key)
    by_id = {case["id"]: i for i, case in enumerate(key["cases"])}
    assert scores["rouge_l"][by_id["r4"], 0] == 1  # it repeats the reference
    assert scores["rouge_l"][by_id["r1"], 0] == scores["f1"][by_id["r1"], 0] == 0  # empty
    assert scores["f1"][by_id["r3"], 0] == 1


def test_a_single_rater_has_means_and_no_agreement(made, tmp_path):
    key = made[1]
    found = study.score(key, [export(key, tmp_path / "a.json", "a", lambda c, s: [s + 1, None, 3])])
    assert found["means"]["reference"]["accuracy"] == {"value": 1, "low": 1, "high": 1, "n": 6}
    assert found["means"]["reference"]["completeness"]["value"] is None
    assert found["agreement"]["accuracy"] == {"alpha": {"value": None, "low": None, "high": None, "n": 0}}
    assert any("-" in line for line in study.table(found))


RATING = {"case": 1, "text": "A", "accuracy": 3, "completeness": 3, "actionability": 3, "comment": ""}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"study": "0" * 16}, "it is of study '0000"),
        ({"format": "another"}, "it is of study"),
        ({"rater": " "}, "names no rater"),
        ({"ratings": [{**RATING, "case": 7}]}, "case 7 is not in the study, which has 6"),
        ({"ratings": [{**RATING, "case": True}]}, "case True is not"),
        ({"ratings": [{**RATING, "text": "D"}]}, "case 1 has no text 'D'"),
        ({"ratings": [{**RATING, "accuracy": 6}]}, "accuracy is 1 to 5; got 6"),
        ({"ratings": [{**RATING, "accuracy": 2.5}]}, "accuracy is 1 to 5; got 2.5"),
        ({"ratings": [RATING, RATING]}, "case 1, text A is rated twice"),
        ({"ratings": [{"case": 1}]}, "not a file that the rating page exports"),
        ({"ratings": 3}, "not a file that the rating page exports"),
        ({"ratings": []}, "no text is rated"),
    ],
)
def test_a_wrong_export_is_named(made, tmp_path, change, message):
    path = export(made[1], tmp_path / "a.json", "a", lambda c, s: [3, 3, 3], change)
    with pytest.raises(UserError, match=rf"--exports: .*{message}"):
        study.score(made[1], [path])


def test_exports_of_one_rater_are_not_two(made, tmp_path):
    paths = [export(made[1], tmp_path / name, rater, lambda c, s: [3, 3, 3]) for name, rater in (("a.json", "Anna"), ("b.json", "anna "))]
    with pytest.raises(UserError, match="--exports: .*a.json and .*b.json are both of rater"):
        study.score(made[1], paths)
    (tmp_path / "c.json").write_text("{")
    (tmp_path / "d.json").write_text("[" * 100_000)
    for name in ("c.json", "d.json", "none.json"):
        with pytest.raises(UserError, match=f"--exports: .*{name}"):
            study.score(made[1], [tmp_path / name])


def test_a_folder_without_a_key_is_named(tmp_path):
    with pytest.raises(UserError, match="--study: .*key.json cannot be read"):
        study.read_key(tmp_path)
    for text in ("{}", "[]", "{", "[" * 100_000):
        (tmp_path / "key.json").write_text(text)
        with pytest.raises(UserError, match="--study: .*key.json is no key"):
            study.read_key(tmp_path)


def test_a_rater_in_a_browser(made, tmp_path, browser):
    """Rate two cases, by mouse and by keyboard, close and come back, export, score."""
    folder, key = made
    context = browser.new_context(accept_downloads=True)
    page, trouble, asked = context.new_page(), [], []
    url = (folder / "study.html").as_uri()
    for opened in (page,):
        opened.on("console", lambda message: trouble.append(message.text))
        opened.on("pageerror", lambda error: trouble.append(str(error)))
        opened.on("dialog", lambda dialog: trouble.append(dialog.message))
        opened.on("request", lambda request: asked.append(request.url))
    page.goto(url)
    shown = [page.locator("article .said").all_inner_texts()]
    page.get_by_role("button", name="Export").click()
    assert "name" in page.locator("#message").inner_text()
    page.get_by_label("rater").fill("Anna")
    for letter, value in zip("ABC", (5, 3, 1)):
        for name in CRITERIA:
            page.locator(f'input[name="{letter}-{name}"][value="{value}"]').check()
    page.get_by_label("Comment on report B").fill(NASTY)
    assert page.locator("#count").inner_text() == "1 of 6 cases rated"

    page.locator("h2").focus()
    page.keyboard.press("n")
    shown.append(page.locator("article .said").all_inner_texts())
    assert page.locator("h2").inner_text() == "Case 2 of 6"
    page.locator('input[name="A-accuracy"][value="1"]').focus()
    page.keyboard.type("432112345")  # three criteria of three reports
    assert page.evaluate("document.activeElement.id") == "next"
    assert page.locator("#count").inner_text() == "2 of 6 cases rated"

    page.reload()
    assert page.locator("h2").inner_text() == "Case 2 of 6"
    assert page.locator("#count").inner_text() == "2 of 6 cases rated"
    assert page.get_by_label("rater").input_value() == "Anna"
    assert page.locator('input[name="A-accuracy"][value="4"]').is_checked()
    page.get_by_role("button", name="case 1, rated").click()
    assert page.get_by_label("Comment on report B").input_value() == NASTY
    with page.expect_download() as download:
        page.get_by_role("button", name="Export").click()
    assert download.value.suggested_filename == f"study-{key['study']}-Anna.json"
    download.value.save_as(tmp_path / "anna.json")
    assert "4 of 6 cases are not complete" in page.locator("#message").inner_text()
    context.close()

    assert trouble == []
    assert {address for address in asked if not address.startswith("blob:")} == {url}
    for texts, case in zip(shown, key["cases"]):
        assert [text.split() for text in texts] == [(text.strip() or "(empty)").split() for _, text in case["texts"]]
    exported = json.loads((tmp_path / "anna.json").read_text())
    assert exported["rater"] == "Anna"
    assert [tuple(rating[name] for name in CRITERIA) for rating in exported["ratings"]] == [
        (5, 5, 5), (3, 3, 3), (1, 1, 1), (4, 3, 2), (1, 1, 2), (3, 4, 5)
    ]  # fmt: skip
    assert exported["ratings"][1]["comment"] == NASTY
    found = study.score(key, [tmp_path / "anna.json"])
    given = [{source: value for (source, _), value in zip(case["texts"], values)} for case, values in zip(key["cases"], ((5, 3, 1), (4, 1, 3)))]
    for i, source in enumerate(key["sources"]):
        assert found["means"][source]["accuracy"]["value"] == (given[0][i] + given[1][i]) / 2


def test_several_studies_in_one_browser_keep_apart(tmp_path, browser):
    context = browser.new_context()
    page = context.new_page()
    for name, text in (("a", "one"), ("b", "two")):
        study.main(["make", "--predictions", write(tmp_path / f"{name}.jsonl", rows([text])), "--out", str(tmp_path / name)])
        page.goto((tmp_path / name / "study.html").as_uri())
        assert page.locator("#count").inner_text() == "0 of 1 cases rated"
        for field in page.locator("fieldset").all():
            field.locator('input[value="2"]').check()
        assert page.locator("#count").inner_text() == "1 of 1 cases rated"
    context.close()
