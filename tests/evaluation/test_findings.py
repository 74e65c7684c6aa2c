import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score, precision_score, recall_score

from toolkit.evaluation.findings import BACK, FINDINGS, _back, finding_scores, findings

P, A, U = "present", "absent", "uncertain"

SENTENCES = [
    # PTB-XL, English
    ("sinus rhythm normal ekg", dict(sinus_rhythm=P, normal_ecg=P)),
    ("sinus rhythm. no definite pathology.", dict(sinus_rhythm=P, normal_ecg=P)),
    ("Sinus tachycardia. Otherwise normal ECG.", dict(sinus_rhythm=P, tachycardia=P, normal_ecg=P)),
    (
        "sinus tachycardia hyperexcited left type peripheral low voltage qrs(t) abnormal inferior infarction probable old",
        dict(sinus_rhythm=P, tachycardia=P, left_axis=P, low_voltage=P, infarction=P),
    ),
    ("sinus rhythm left type no signs of le slow r progression v1-3 normal ecg", dict(sinus_rhythm=P, left_axis=P, normal_ecg=P)),
    ("premature ventricular contraction(s). atrial fibrillation with rapid ventricular response.", dict(pvc=P, atrial_fibrillation=P, tachycardia=P)),
    ("premature atrial contraction(s). sinus rhythm. prolonged pr interval.", dict(pac=P, sinus_rhythm=P, first_degree_av_block=P)),
    ("pr interval is normal. prolonged qt, this may be due to a drug effect", dict(long_qt=P)),
    ("st segments are depressed and t waves inverted in i,    avl, v5,6. this may be due to lv strain or ischaemia.",
     dict(st_depression=P, t_wave_change=P, ischaemia=U)),
    ("t waves are low or flat in i, avl. myocardial ischaemia cannot be excluded.", dict(t_wave_change=P, ischaemia=U)),
    ("old anteroseptal infarct cannot be entirely excluded", dict(infarction=U)),
    ("lateral subendocardial infarction of uncertain age is a possibility.", dict(infarction=U)),
    ("voltages are high in chest leads suggesting lvh", dict(lvh=U)),
    ("q waves in v1-4 consistent with old anterior myocardial infarction", dict(infarction=P)),
    ("left bundle branch block, this is most commonly due to ischaemic heart disease", dict(lbbb=P)),
    ("right bundle branch block. bifascicular block. patient may be at increased risk of developing complete heart block.", dict(rbbb=P, fascicular_block=P)),
    ("the cause of the bradycardia is not evident. sinus bradycardia.", dict(sinus_rhythm=P, bradycardia=P)),
    ("regular rhythm, no definite p wave found. t wave inversion", dict(t_wave_change=P)),
    ("leads v4,5,6 show artifact", dict(poor_quality=P)),
    # PTB-XL, German
    ("Sinusrhythmus Lagetyp normal normales EKG", dict(sinus_rhythm=P, normal_ecg=P)),
    ("vorhofflimmern/-flattern linkstyp linksschenkelblock linkshypertrophie mÖglich", dict(atrial_fibrillation=P, left_axis=P, lbbb=P, lvh=U)),
    ("supraventrikulÄre extrasystole(n) sinusrhythmus a-v block i rechtstyp", dict(pac=P, sinus_rhythm=P, first_degree_av_block=P, right_axis=P)),
    ("qrs(t) abnorm    anteroseptaler infarkt     nicht auszuschliessen qt-verlÄngerung", dict(infarction=U, long_qt=P)),
    ("inferiorer infarkt     wahrscheinlich alt t abnorm in anterioren ableitungen", dict(infarction=P, t_wave_change=P)),
    ("keine ischämie", dict(ischaemia=A)),
    # MIMIC-IV-ECG
    ("Sinus rhythm with 1st degree A-V block", dict(sinus_rhythm=P, first_degree_av_block=P)),
    ("Possible inferior infarct - age undetermined", dict(infarction=U)),
    ("Cannot rule out anterior infarct - age undetermined", dict(infarction=U)),
    ("RBBB with left anterior fascicular block", dict(rbbb=P, fascicular_block=P)),
    ("Inferior ST elevation, CONSIDER ACUTE INFARCT", dict(st_elevation=P, infarction=U)),
    ("Extensive ST-T changes may be due to myocardial ischemia", dict(t_wave_change=P, ischaemia=U)),
    ("Low QRS voltages in precordial leads", dict(low_voltage=P)),
    ("Mobitz I (Wenckebach) 2nd degree A-V block", dict(higher_av_block=P)),
    ("A-V dual-paced rhythm with some inhibition", dict(pacemaker=P)),
    ("Wandering atrial pacemaker", {}),
    ("Borderline first degree A-V block", dict(first_degree_av_block=U)),
    ("Abnormal ECG", dict(normal_ecg=A)),
    ("Ventricular preexcitation(WPW)", dict(wpw=P)),
    # negation, uncertainty and their reach
    ("No evidence of acute ischemia or infarction.", dict(ischaemia=A, infarction=A)),
    ("Sinus rhythm without ST elevation, T wave inversion, or ST depression. LVH.",
     dict(sinus_rhythm=P, st_elevation=A, t_wave_change=A, st_depression=A, lvh=P)),
    ("No ST elevation but T wave inversion", dict(st_elevation=A, t_wave_change=P)),
    ("no atrial flutter, right axis deviation", dict(atrial_flutter=A, right_axis=P)),
    ("T waves are not inverted", dict(t_wave_change=A)),
    ("This rules out infarction. Ischaemia is unlikely.", dict(infarction=A, ischaemia=A)),
    ("no significant change in the T wave inversions", dict(t_wave_change=P)),
    ("absence of sinus rhythm", dict(sinus_rhythm=A)),
    ("not in normal sinus rhythm", dict(sinus_rhythm=A)),
    ("non-ST elevation myocardial infarction", dict(infarction=P)),
    ("inferior infarct? ?LVH", dict(infarction=U, lvh=U)),
    ("No RVH in V1. RVH in V2.", dict(rvh=P)),
    ("possible infarct. no infarct", dict(infarction=U)),
    ("supraventricular extrasystoles", dict(pac=P)),
    # what a hostile reader tried
    ("ST-segment depression in V5. ST-depression.", dict(st_depression=P)),
    ("No ST-segment depression", dict(st_depression=A)),
    ("ST segments elevated", dict(st_elevation=P)),
    ("left axis deviation is not present", dict(left_axis=A)),
    ("ventricular ectopic beats are not seen. right axis deviation cannot be excluded", dict(pvc=A, right_axis=U)),
    ("low QRS voltages absent", dict(low_voltage=A)),
    ("no pathological q waves. lvh", dict(lvh=P)),
    ("no significant abnormality of the st segment. old infarct.", dict(infarction=P)),
    ("sinus rhythm. intervals within normal limits. inferior infarct.", dict(sinus_rhythm=P, infarction=P)),
    ("Sinus rhythm, ECG within normal limits", dict(sinus_rhythm=P, normal_ecg=P)),
    ("Sinus bradycardia. Within normal limits.", dict(sinus_rhythm=P, bradycardia=P, normal_ecg=P)),
    ("without pathological findings", dict(normal_ecg=P)),
    ("no longer in atrial fibrillation. st elevation no longer evident", dict(atrial_fibrillation=A, st_elevation=A)),
    ("no longer in normal sinus rhythm", dict(sinus_rhythm=A)),
    ("sinus rhythm w/o pvcs, lack of ischemia", dict(sinus_rhythm=P, pvc=A, ischaemia=A)),
    ("ST elevation and T wave inversion are absent", dict(st_elevation=A, t_wave_change=A)),
    ("LVH and ST depression are possible", dict(lvh=U, st_depression=U)),
    ("atrial fibrillation and p waves are not seen", dict(atrial_fibrillation=P)),
    ("sinus rhythm and st elevation is absent", dict(sinus_rhythm=P, st_elevation=A)),
    ("non-ischemic cardiomyopathy, NSR", dict(sinus_rhythm=P)),
    ("trace only requested", {}),
    ("", {}),
]  # fmt: skip


@pytest.mark.parametrize("sentence, expected", SENTENCES)
def test_a_sentence_says_these_findings(sentence, expected):
    assert findings(sentence) == expected
    assert findings(sentence.upper()) == expected


def test_every_finding_is_in_the_table():
    assert set().union(*(expected for _, expected in SENTENCES)) == set(FINDINGS)


def test_findings_come_in_the_order_of_the_list_and_own_their_answer():
    said = findings("normal ecg. sinus rhythm")
    assert list(said) == ["sinus_rhythm", "normal_ecg"]
    said.clear()
    assert findings("normal ecg. sinus rhythm")


def report(reference):
    return {"task": "report", "reference": reference}


def score(name, references, predictions):
    return {one.name: one for one in finding_scores([report(text) for text in references], predictions)}[name]


def test_the_scores_are_those_counted_by_hand():
    references = ["sinus rhythm. possible old infarct", "atrial fibrillation. lvh", "no ischaemia"]
    predictions = ["sinus rhythm. infarct. lvh", "", "ischaemia"]
    # right: sinus, infarct (a hedge counts); false: lvh, ischaemia (the reference says there is none); missed: atrial fibrillation, lvh
    assert score("precision", references, predictions).all() == 2 / 4
    assert score("recall", references, predictions).all() == 2 / 4
    assert score("f1", references, predictions).all() == 4 / 8
    assert score("f1_macro", references, predictions).all() == (1 + 1 + 0 + 0 + 0) / 5
    assert score("f1:lvh", references, predictions).all() == 0
    assert score("recall:infarction", references, predictions).all() == 1
    assert np.isnan(score("f1:wpw", references, predictions).all())
    assert score("f1", references, predictions).stats.tolist() == [[2, 1, 0], [0, 0, 2], [0, 1, 0]]


def test_an_empty_prediction_scores_nothing_and_stays():
    for name in ("precision", "recall", "f1", "f1_macro", "f1:lvh", "precision:lvh", "recall:lvh"):
        one = score(name, ["lvh", "lvh"], ["", "lvh"])
        assert one.rows.tolist() == [0, 1]
        assert one.on(np.array([0])).all() == 0
    assert np.isnan(score("f1", [""], [""]).all())


def test_other_tasks_are_passed_over_and_no_reports_are_no_error():
    rows = [{"task": "ecgqa", "reference": "yes"}, report("lvh")]
    first = finding_scores(rows, ["lvh", "lvh"])[0]
    assert (first.rows.tolist(), first.all()) == ([1], 1)
    assert all(np.isnan(one.all()) for one in finding_scores([], []))


TEXTS = st.lists(st.sampled_from([text for text, _ in SENTENCES]), max_size=3).map(". ".join)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=6), st.randoms())
def test_the_scores_are_scikit_learns_whatever_the_order(pairs, random):
    references, predictions = zip(*pairs)
    scores = {one.name: one for one in finding_scores([report(text) for text in references], list(predictions))}
    positive = [np.array([[findings(text).get(name) in (P, U) for name in FINDINGS] for text in texts]) for texts in (references, predictions)]
    for name, library in (("precision", precision_score), ("recall", recall_score), ("f1", f1_score)):
        value = scores[name].all()
        if positive[0].any() or positive[1].any():
            assert value == pytest.approx(library(*positive, average="micro", zero_division=0))
        else:
            assert np.isnan(value)
        for i, finding in enumerate(FINDINGS):
            if positive[0][:, i].any() or positive[1][:, i].any():
                assert scores[f"{name}:{finding}"].all() == pytest.approx(library(positive[0][:, i], positive[1][:, i], zero_division=0))
    seen = (positive[0] | positive[1]).any(0)
    if seen.any():
        # one by one: of a single column, scikit-learn's macro would be the mean of true and false
        each = [f1_score(positive[0][:, i], positive[1][:, i], zero_division=0) for i in np.flatnonzero(seen)]
        assert scores["f1_macro"].all() == pytest.approx(np.mean(each))
    mixed = random.sample(pairs, len(pairs))
    for one in finding_scores([report(text) for text, _ in mixed], [text for _, text in mixed]):
        assert one.all() == pytest.approx(scores[one.name].all(), nan_ok=True)
        assert np.isnan(one.all()) or 0 <= one.all() <= 1


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=200))
def test_any_text_is_read(text):
    assert set(findings(text).values()) <= {P, A, U}


def test_words_out_of_reach_are_not_looked_at():
    """Of a model that repeats itself 15,000 letters took 8 s, and twice as many four times as long: each mention looked through the whole text before it."""
    text = "infarct probably " * 300
    for place in range(0, len(text), 17):
        assert len(text[_back(text, place) : place].split()) == min(BACK, 2 * place // 17)
    assert findings(text + "lvh") == dict(infarction=P, lvh=U)
    assert findings("no " + "infarct " * 9 + "lvh") == dict(infarction=A, lvh=P)


def test_the_names_do_not_depend_on_the_predictions():
    rows = [report("lvh"), report("sinus rhythm")]
    for predictions in (["", ""], ["wpw", "lbbb"]):
        scores = finding_scores(rows, predictions)
        assert len(scores) == 4 + 3 * len(FINDINGS)
        assert [one.name for one in scores] == [one.name for one in finding_scores(rows, ["lvh", "sinus rhythm"])]
        assert all(one.rows.tolist() == [0, 1] for one in scores)


def test_values_are_of_many_sums_at_once():
    for one in finding_scores([report("lvh. sinus rhythm")], ["lvh. wpw"]):
        many = one.value(np.stack([one.stats.sum(0), 2 * one.stats.sum(0), 0 * one.stats.sum(0)]))
        assert many.shape == (3,)
        assert many[:2] == pytest.approx([one.all()] * 2, nan_ok=True)
        assert np.isnan(many[2])
