"""`ask`: what it says of a recording against the parts that it is made of, on files of every kind; the ECG tokenizer that a model carries."""

import copy
import json
import shutil
import sys

import numpy as np
import pytest
import torch
import wfdb

from toolkit.ecg.leads import LEADS
from toolkit.ecg.synthetic import write_corpus
from toolkit.errors import UserError
from toolkit.evaluation import ask
from toolkit.evaluation.constrained import answer_constrained
from toolkit.evaluation.generate import answer_tasks
from toolkit.lm import merge
from toolkit.lm.attention import plain_attention
from toolkit.lm.backbone import backbone_digest, save_stamp
from toolkit.lm.carried import FOLDER, ecg_tokenizer_of
from toolkit.lm.continuous import ECGAdapter
from toolkit.lm.lora import add_lora, save_adapter
from toolkit.tasks.prompts import Prompts, background_text
from toolkit.tokenizer.features import ECGFeatures
from toolkit.tokenizer.tokenizer import ECGTokenizer, TokenizerConfig

QUESTION = "Does this ECG show symptoms of atrial fibrillation?"
ARRAY = ["--sampling_rate", "500", "--unit", "uV", "--leads", *reversed(LEADS)]


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """A run folder with `model`, `untuned`, `backbone` and adapters of it, each as a launcher writes it; and the ECG tokenizer beside it."""
    out = tmp_path_factory.mktemp("ask")
    torch.manual_seed(0)
    ecg_tokenizer = ECGTokenizer(TokenizerConfig()).eval()
    ecg_tokenizer.save_pretrained(out / "tokenizer")
    model, tokenizer, vocabulary = tiny
    with plain_attention(model):
        model = copy.deepcopy(model)
    index = {"tokenizer": ecg_tokenizer.fingerprint(), "codes": 1296, "levels": [6] * 4}
    tuned = {"tuned_on": ["report", "single-verify"]}
    for name, more in (
        ("model", {"prompts": {"background": True}, **tuned}),
        ("untuned", {}),
        ("backbone", {}),
        ("reports", {"prompts": {}, "tuned_on": ["report"]}),
    ):
        model.save_pretrained(out / name)
        tokenizer.save_pretrained(out / name)
        save_stamp(out / name, index, knows_text=True, **more)
        ecg_tokenizer.save_pretrained(out / name / FOLDER)
    lm = add_lora(model, 4, 8, 0.0)
    with torch.no_grad():
        for weight in lm.parameters():
            if weight.requires_grad:
                weight.add_(0.05 * torch.randn_like(weight))
    state = {name: weight.detach() for name, weight in lm.named_parameters() if weight.requires_grad}
    lm.peft_config["default"].base_model_name_or_path = str(out / "backbone")
    for name, more in (("adapter", {}), ("adapter/last", {}), ("continuous", {"ecg_input": "continuous"})):
        (out / name).mkdir()
        save_adapter(lm, out / name, state)
        tokenizer.save_pretrained(out / name)
        save_stamp(out / name, index, knows_text=True, prompts={}, **tuned, **more)
    for name in ("adapter", "continuous"):
        ecg_tokenizer.save_pretrained(out / name / FOLDER)
    layer = ECGAdapter(np.zeros(192, np.float32), np.ones(192, np.float32), 256, vocabulary.code_rows)
    layer.save(out / "continuous", layer.state_dict())
    return out


@pytest.fixture(scope="module")
def ecg(runs):
    """float32 [12, 5000] mV of a WFDB record at `runs/records/secret`, and the same as an array in uV with its leads the other way round."""
    corpus = write_corpus(runs / "corpus", records=1)
    header = next(corpus.rglob("*.hea"))
    signal = wfdb.rdrecord(str(header.with_suffix("")))
    (runs / "records").mkdir()
    wfdb.wrsamp("secret", 500, ["mV"] * 12, signal.sig_name, signal.p_signal, fmt=["16"] * 12, write_dir=str(runs / "records"))
    read = ask.read(str(runs / "records" / "secret"), 0.0, "")[0]
    np.save(runs / "records" / "secret.npy", 1000 * read[::-1].T)
    return read


def said(capsys, *words) -> dict:
    capsys.readouterr()
    ask.main([*map(str, words), "--json"])
    return json.loads(capsys.readouterr().out)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def by_hand(runs, name, ecg, tasks, age=None, sex=""):
    """(how, samples, adapter) of the same model by its parts."""
    ecg_tokenizer = ECGTokenizer.from_pretrained(runs / "tokenizer")
    lm, tokenizer, vocabulary, prompts, adapter = ask.load_trained(runs / name, {"tokenizer": ecg_tokenizer.fingerprint()}, torch.float32)
    meta = {"gains": [ecg.std(1)], "ages": [age], "sexes": [sex]}
    if adapter:
        meta["features"] = ECGFeatures(ecg_tokenizer).encode(ecg[None])
    return (lm, tokenizer, vocabulary, prompts), [(ecg_tokenizer.encode(ecg[None]), meta, tasks)], adapter


@pytest.mark.parametrize("name", ["model", "adapter", "continuous"])
def test_answers_are_those_of_the_model(runs, ecg, capsys, name):
    found = said(capsys, "--model", runs / name, "--record", runs / "records" / "secret", "--question", QUESTION, "Which rhythm?")
    tasks = [{"task": "ecgqa", "question": question} for question in (QUESTION, "Which rhythm?")]
    how, samples, adapter = by_hand(runs, name, ecg, tasks)
    (expected,) = answer_tasks(*how, samples, 128, "cpu", adapter)
    assert [(one["prediction"], one["question"]) for one in found["answers"]] == [(one.prediction, task["question"]) for one, task in zip(expected, tasks)]
    for one, other in zip(found["answers"], expected):
        assert one["loglik"] == pytest.approx(other.loglik, abs=1e-3) and one["probability"] == pytest.approx(np.exp(one["loglik"]))
    assert found["banner"] == "Research software. Not a medical device; not for diagnosis." and found["flags"] == []
    ends = [len(how[1].encode(one.prediction, add_special_tokens=False)) < 128 for one in expected]
    assert any("is cut" in note for note in found["notes"]) == (not all(ends)) and len(found["notes"]) == (not all(ends))


def test_choices_are_scored(runs, ecg, capsys):
    words = ["--model", runs / "model", "--record", runs / "records" / "secret", "--question", QUESTION, "Again?", "--choices", "yes", "no", "not sure"]
    found = said(capsys, *words, "--age", 93, "--sex", "female")
    task = {"task": "ecgqa", "question_type": "single-verify", "template_id": 7}
    how, samples, _ = by_hand(runs, "model", ecg, [{**task, "question": QUESTION}, {**task, "question": "Again?"}], 90.0, "female")
    assert how[3] == Prompts(background=True) and background_text(samples[0][1]) == "Patient: 90 years or older, female."
    (expected,) = answer_constrained(*how, samples, {7: ["no", "not sure", "yes"]}, "cpu")
    for one, other in zip(found["answers"], expected, strict=True):
        assert one["prediction"] == other["prediction"] and one["likelihoods"] == pytest.approx(other["likelihoods"], abs=1e-4)
    unknown = said(capsys, *words)
    assert unknown["answers"][0]["loglik"] != pytest.approx(expected[0]["loglik"], abs=1e-4)  # age and sex are in the prompt, if they are given
    ask.main([*map(str, words)])
    text = capsys.readouterr().out
    assert text.splitlines()[0] == ask.BANNER
    shown = [line.split("   ")[0].strip() for line in text.splitlines() if "log-likelihood" in line]
    assert shown[:3] == list(unknown["answers"][0]["likelihoods"]) and sorted(shown[:3]) == ["no", "not sure", "yes"]


def test_a_bare_array_is_the_same_recording(runs, ecg, capsys):
    words = ["--model", runs / "model", "--question", QUESTION, "--choices", "yes", "no"]
    record = said(capsys, *words, "--record", runs / "records" / "secret")
    array = said(capsys, *words, "--record", runs / "records" / "secret.npy", *ARRAY)
    assert array["answers"][0]["likelihoods"] == pytest.approx(record["answers"][0]["likelihoods"], abs=1e-3)


def test_the_report_is_drawn_under_the_banner_and_names_nobody(runs, ecg, capsys, tmp_path):
    (tmp_path / "ecg.png").write_bytes(b"an older one")
    ask.main(["--model", str(runs / "reports"), "--record", str(runs / "records" / "secret")])
    text = capsys.readouterr().out
    assert "\nReport:\n" in text and "secret" not in text and "note" not in text.replace("note: an answer did not end", "")
    assert (tmp_path / "ecg.png").read_bytes()[:4] == b"\x89PNG"
    found = said(capsys, "--model", runs / "reports", "--record", runs / "records" / "secret", "--draw", "page.svg")
    page = (tmp_path / "page.svg").read_text()
    assert ask.BANNER in page and "secret" not in page + json.dumps(found) and found["drawing"] == "page.svg"
    assert found["answers"][0]["question"] is None


def test_what_is_to_be_known_is_said(runs, ecg, capsys, tmp_path):
    record = runs / "records" / "secret"
    ask_about = ["--question", QUESTION, "--choices", "yes", "no"]
    (note,) = said(capsys, "--model", runs / "untuned", "--record", record, *ask_about)["notes"]
    assert note.startswith("this model was never tuned on questions or reports")
    (note,) = said(capsys, "--model", runs / "reports", "--record", record, *ask_about)["notes"]
    assert note.startswith("this model was never tuned on questions, but on report")
    (note,) = said(capsys, "--model", runs / "adapter", "--record", record, *ask_about, "--sex", "male")["notes"]
    assert note.startswith("age and sex are not used")
    flat = np.concatenate([ecg, ecg, ecg[:, :2600]], 1)
    flat[3] = 0
    np.save(tmp_path / "long.npy", flat)
    how = ["--sampling_rate", "500", "--unit", "mV", "--leads", *LEADS]
    found = said(capsys, "--model", runs / "model", "--record", "long.npy", *how, *ask_about, "--start", "20")
    assert found["flags"] == ["flat_lead", "padded"] and found["start"] == 20
    assert [note.split(" ")[0] for note in found["notes"]] == ["the", "recordings"] and "3 windows" in found["notes"][0]


def test_where_the_ecg_tokenizer_is_found(runs, ecg, capsys, tmp_path):
    wanted = ECGTokenizer.from_pretrained(runs / "tokenizer").fingerprint()
    for name in ("model", "adapter", "adapter/last"):  # that of the folder around it
        assert ecg_tokenizer_of(runs / name).fingerprint() == wanted
    merge.main(["--adapter", str(runs / "adapter"), "--out", str(tmp_path / "merged")])
    assert ecg_tokenizer_of(tmp_path / "merged").fingerprint() == wanted
    words = ["--record", runs / "records" / "secret", "--question", QUESTION, "--choices", "yes", "no"]
    one, other = (said(capsys, "--model", model, *words)["answers"][0] for model in (runs / "adapter", tmp_path / "merged"))
    assert one["likelihoods"] == pytest.approx(other["likelihoods"], abs=1e-4)

    shutil.copytree(runs / "adapter", tmp_path / "old", ignore=shutil.ignore_patterns(FOLDER, "last"))
    with pytest.raises(UserError, match="--tokenizer: .*old carries no ecg_tokenizer/"):
        ask.main(["--model", "old", *map(str, words)])
    assert said(capsys, "--model", "old", "--tokenizer", runs / "tokenizer", *words)["answers"][0] == one
    merge.main(["--adapter", str(tmp_path / "old"), "--out", str(tmp_path / "merged_old")])
    assert not (tmp_path / "merged_old" / FOLDER).exists()


def test_what_a_backbone_is_does_not_depend_on_what_it_carries(runs, tiny, tmp_path):
    shutil.copytree(runs / "backbone", tmp_path / "without", ignore=shutil.ignore_patterns(FOLDER))
    assert backbone_digest(str(tmp_path / "without"), tiny[0]) == backbone_digest(str(runs / "backbone"), tiny[0])


def test_mistakes_are_one_line(runs, ecg, tmp_path, monkeypatch, capsys):
    np.save("short.npy", ecg[:, :2000])
    np.save("no_ecg.npy", np.full((12, 5000), 2e6))
    np.save("strange.npy", np.zeros((12, 5000)))
    (tmp_path / "text.hea").write_text("Dear colleague,\n")
    shutil.copytree(runs / "model", "damaged")
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"half")
    shutil.copytree(runs / "model", "other")
    torch.manual_seed(1)
    ECGTokenizer(TokenizerConfig()).save_pretrained("other/" + FOLDER)
    model, record = ["--model", str(runs / "model")], ["--record", str(runs / "records" / "secret")]
    how = ["--sampling_rate", "500", "--unit", "mV", "--leads", *LEADS]
    for words, message in (
        ([*model, "--record", "nowhere"], r"--record: it cannot be used \(absent\): .*; name a WFDB record without its extension"),
        ([*model, "--record", "text"], r"--record: it cannot be used \(unreadable\)"),
        ([*model, "--record", "short.npy", *how], r"--record: it cannot be used \(too_short\): 4.00 s, at least 5 s"),
        ([*model, "--record", "no_ecg.npy", *how], r"--record: it cannot be used \(amplitude\)"),
        ([*model, "--record", "strange.npy", *how[:4], "--leads", "X", *LEADS[1:]], r"--draw: nowhere/x.png cannot be written"),
        ([*model, "--record", "strange.npy", *how[:4], "--leads", *map(str, range(12))], r"--record: it cannot be used \(missing_lead\)"),
        ([*model, "--record", "short.npy", *how[:2]], r"--record: a bare array does not say what it holds; add --sampling_rate 500"),
        ([*model, *record, "--unit", "mV"], r"--sampling_rate, --unit, --leads: describe a bare array"),
        ([*model, *record, "--start", "8"], r"--start: at 8 s too little is left of the recording \(2.00 s"),
        ([*model, "--record", "."], r"--record: this is no ECG record; name a WFDB record"),
        ([*model, *record, "--question", "Q?", "--choices", "yes", "yes"], r"--choices: one answer is no choice"),
        ([*model, *record, "--age", "500"], r"--age: 500 is no age"),
        ([*model, *record, "--start", "nan"], r"--record: it cannot be used"),
        ([*model, *record, "--choices", "yes"], r"--choices: are answers to a question"),
        ([*model, *record, "--question", " "], r"--question: one of them is empty"),
        ([*model, *record, "--age", "nan"], r"--age: nan is no age"),
        ([*model, *record, "--draw", "x.docx"], r"--draw: x.docx has to end with .png or .svg"),
        (["--model", "nowhere", *record], r"--model: nowhere has no heartspeed.json"),
        (["--model", "damaged", *record], r"--model: damaged does not load"),
        (["--model", "other", *record], r"--tokenizer: .*/other/ecg_tokenizer is \w{16}, and other was trained on the codes of \w{16}; name that one"),
        ([*model, *record, "--tokenizer", "nowhere"], r"--tokenizer: nowhere has no config.json"),
    ):
        more = ["--draw", "nowhere/x.png"] if "X" in words else []
        with pytest.raises(UserError, match=message) as raised:
            ask.main([*words, *more])
        assert "\n" not in str(raised.value) and "secret" not in str(raised.value)
    (tmp_path / "damaged" / "heartspeed.json").write_text("{")
    monkeypatch.setattr(sys, "argv", ["ask", "--model", "damaged", *record])
    with pytest.raises(SystemExit, match="2"):
        ask.exit_2_on_user_error(ask.main)()
    assert capsys.readouterr().err == "error: --model: damaged/heartspeed.json is damaged; make the model again\n"
