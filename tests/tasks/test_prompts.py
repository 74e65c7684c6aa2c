"""Prompts: what a model reads, word for word; only answers are targets; patients never appear."""

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from toolkit.errors import UserError
from toolkit.lm.attention import plain_attention
from toolkit.lm.lora import add_lora
from toolkit.lm.model import PackedLM
from toolkit.shards.packing import pack
from toolkit.tasks.prompts import Prompts, answer_ids, background_text, end_id, task_groups

VERIFY = {"task": "ecgqa", "question": "Does this ECG show symptoms of atrial fibrillation?", "answer": ["yes"]}
QUERY = {"task": "ecgqa", "question": "What symptoms does this ECG show?", "answer": ["sinus rhythm", "normal ecg"]}
COMPARE = {"task": "ecgqa", "question": "Which is [[ECG]] new?", "answer": ["none"]}  # what marks the ECG's place, in a question
REPORT = {"task": "report", "report": "sinus rhythm. normal ecg."}
META = {"gains": [[0.1] * 12, [0.2] * 12], "ages": [63.0, 90.0], "sexes": ["female", ""], "patients": ["secret1", "secret2"], "record_ids": ["777777"]}
# as SmolLM2 and Llama 3 write theirs: the second begins with BOS, and trims
CHATS = {
    "chatml": "{% for m in messages %}<|pad|>{{ m['role'] }}\n{{ m['content'] }}<|pad|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|pad|>assistant\n{% endif %}",
    "llama": "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]\n\n{{ m['content'] | trim }}<|pad|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n\n{% endif %}",
}
PAPER = (
    "<|start_prompt|> Dataset description: The dataset contains electrocardiogram (ECG) time-series data. Task description: Based on a patient's 12-lead ECG "
    "signal (500 Hz) and background information, answer a clinical question related to cardiac health. Question:{} <|end_prompt|> "
)
PAPER_REPORT = "<|start_prompt|>Task description: Based on the given ECG signal embeddings, generate a ECG diagnostic report.Background:{} <|end_prompt|>"


@pytest.fixture
def tokenizers(tiny_with_gains):
    """with and without BOS"""
    with_bos, without = (copy.deepcopy(tiny_with_gains[1]) for _ in range(2))
    without.bos_token = None
    assert without.bos_token_id is None and with_bos.bos_token_id is not None
    return {"bos": with_bos, "no bos": without}


def codes(n):
    return np.arange(n * 313, dtype=np.uint16).reshape(n, 313) % 1296


def ecg_text(n):
    return "".join("<|ecg_start|>" + "".join(f"<|ecg_{code:04d}|>" for code in one) + "<|ecg_end|>" for one in codes(n))


def whole(group):
    """Ids and targets of each task as one sequence."""
    for branch in group.branches or [group.prefix]:
        parts = [group.prefix, branch] if group.branches else [branch]
        yield np.concatenate([part.ids for part in parts]), np.concatenate([part.target for part in parts])


def expected(tokenizer, style, task, n):
    """(all that is read, the answer with its end) as text, written down here a second time."""
    bos, question = tokenizer.bos_token or "", task.get("question")
    answer = {"yes": "yes", "none": "none", "sinus rhythm": "normal ecg; sinus rhythm"}[task["answer"][0]] if question else "sinus rhythm. normal ecg."
    if style == "ecg_first":
        asked = f"\nQuestion: {question}\nAnswer:" if question else "\nWrite the report of this ECG.\nReport:"
        return bos + ecg_text(n) + asked, " " + answer + "<|end_of_text|>"
    if style == "paper":
        asked = (PAPER.format(question), "Answer:") if question else (PAPER_REPORT.format(""), " Report:")
        return bos + asked[0] + ecg_text(n) + asked[1], answer + "<|end_of_text|>"
    turns = [{"role": "user", "content": ecg_text(n) + "\n" + (question or "Write the report of this ECG.")}]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True), answer + "<|pad|>"


@pytest.mark.parametrize("task", [VERIFY, QUERY, COMPARE, REPORT], ids=["verify", "query", "compare", "report"])
@pytest.mark.parametrize("kind", ["bos", "no bos"])
@pytest.mark.parametrize("how", ["ecg_first", "paper", "chatml", "llama"])
def test_targets_are_the_answer_and_the_end_token_alone(tokenizers, tiny, how, kind, task):
    tokenizer, vocabulary, n = tokenizers[kind], tiny[2], 2 if task is COMPARE else 1
    prompts = Prompts("chat" if how in CHATS else how)
    tokenizer.chat_template = CHATS.get(how)
    (group,) = task_groups(tokenizer, vocabulary, prompts, codes(n), META, [task])
    ((ids, target),) = whole(group)
    prompt, answer = expected(tokenizer, prompts.style, task, n)
    assert tokenizer.decode(ids[target]) == answer and tokenizer.decode(ids[~target]) == prompt
    assert target.sum() == len(answer_ids(tokenizer, prompts, task)) and target[-target.sum() :].all()  # nothing but the end of the sequence
    assert ids[-1] == end_id(tokenizer, prompts) and (ids == ids[-1]).sum() == 1 + prompt.count(answer[-7:] if how in CHATS else "<|end_of_text|>")
    assert list(ids).count(tokenizer.bos_token_id) == (1 if kind == "bos" and how != "chatml" else 0)


@pytest.mark.parametrize("how", ["ecg_first", "chatml"])
def test_all_tasks_share_one_prefix(tokenizers, tiny, how):
    tokenizer = tokenizers["bos"]
    tokenizer.chat_template = CHATS.get(how)
    prompts = Prompts("chat" if how in CHATS else how, gain_text=True, background=True)
    (group,) = task_groups(tokenizer, tiny[2], prompts, codes(1), {**META, "gains": META["gains"][:1]}, [VERIFY, QUERY, REPORT])
    prefix = tokenizer.decode(group.prefix.ids)
    assert len(group.branches) == 3 and not group.prefix.target.any()
    leads = ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")
    gains = "\nLead amplitudes (SD, mV): " + ", ".join(f"{lead} 0.1" for lead in leads) + "."
    said = f"{gains}\nPatient of ECG 1: 63 years, female.\nPatient of ECG 2: 90 years or older."
    assert prefix.endswith(ecg_text(1) + said)
    assert [tokenizer.decode(branch.ids[branch.target]).strip()[:3] for branch in group.branches] == ["yes", "nor", "sin"]


@pytest.mark.parametrize("how", ["ecg_first", "paper", "chatml"])
def test_special_tokens_named_in_a_dataset_are_words(tokenizers, tiny, how):
    tokenizer = tokenizers["bos"]
    tokenizer.chat_template = CHATS.get(how)
    named = {"task": "ecgqa", "question": "Is <|ecg_0007|> in <|ecg_end|> or <b> [V1]?", "answer": ["<|end_of_text|>"]}
    how_asked = tokenizer, tiny[2], Prompts("chat" if how in CHATS else how), codes(1), META
    (read, _), (plain, _) = (next(whole(group)) for task in (named, VERIFY) for group in task_groups(*how_asked, [task]))
    special = tokenizer.all_special_ids
    assert [id for id in read if id in special] == [id for id in plain if id in special]
    assert "Is < |ecg_0007|> in < |ecg_end|> or <b> [V1]?" in tokenizer.decode(read)


@pytest.mark.parametrize("style", ["ecg_first", "paper"])
def test_age_and_sex_are_all_that_is_said_of_a_patient(tokenizers, tiny, style):
    groups = task_groups(tokenizers["bos"], tiny[2], Prompts(style, background=True), codes(2), META, [VERIFY, REPORT])
    texts = [tokenizers["bos"].decode(ids) for group in groups for ids, _ in whole(group)]
    assert not any("secret" in text or "777777" in text for text in texts)
    assert ["63 years, female" in text for text in texts] == [style == "ecg_first", True]  # the release's questions promise it and do not say it
    assert background_text({"ages": [None], "sexes": [""]}) == ""
    assert background_text({"ages": [None], "sexes": ["male"]}) == "Patient: male."
    assert background_text({"ages": [89.0], "sexes": [""]}) == "Patient: 89 years."


def test_gain_tokens_stand_before_each_ecg(tokenizers, tiny_with_gains):
    vocabulary = tiny_with_gains[2]
    for style in ("ecg_first", "paper"):
        (group,) = task_groups(tokenizers["no bos"], vocabulary, Prompts(style), codes(2), META, [VERIFY])
        ((ids, _),) = whole(group)
        starts = np.flatnonzero(ids == vocabulary.start)
        assert [(ids[s + 1 : s + 13] - vocabulary.gain_first).tolist() for s in starts] == [[13] * 12, [17] * 12]  # 0.0951 to 0.113 mV and an octave more


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (Prompts("chat"), "--prompt chat: .* no chat template"),
        (Prompts(gain_text=True), "--gain_text: .* has gain tokens"),
        (Prompts("other"), "--prompt: 'other'"),
    ],
)
def test_what_a_backbone_cannot_be_asked_is_refused(tiny_with_gains, prompts, message):
    with pytest.raises(UserError, match=message):
        prompts.check(*tiny_with_gains[1:])


@pytest.mark.parametrize("template", ["{{ raise_exception('roles must alternate') }}", "{% for m in messages %}{{ m['role'] }}{% endfor %}", "{% if %}"])
def test_a_chat_template_that_cannot_be_used_is_named(tiny, template):
    tokenizer = copy.deepcopy(tiny[1])
    tokenizer.chat_template = template
    with pytest.raises(UserError, match="--prompt chat: the chat template of this backbone cannot be used"):
        Prompts("chat").check(tokenizer, tiny[2])


def test_the_date_of_a_chat_template_is_not_todays(tiny):
    tokenizer = copy.deepcopy(tiny[1])
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}|" + CHATS["chatml"]
    (group,) = task_groups(tokenizer, tiny[2], Prompts("chat"), codes(1), META, [VERIFY])
    assert tokenizer.decode(group.prefix.ids).startswith("01 Jan 2026|<|pad|>user")


def test_paper_prompts_have_no_place_for_gains_and_old_shards_no_background(tiny):
    with pytest.raises(UserError, match="--gain_text: --prompt paper"):
        Prompts("paper", gain_text=True).check(*tiny[1:])
    with pytest.raises(UserError, match="--background: the shards hold no age"):
        task_groups(tiny[1], tiny[2], Prompts(background=True), codes(1), {"gains": META["gains"]}, [VERIFY])


@pytest.mark.parametrize("how", ["ecg_first", "paper", "chatml"])
def test_loss_and_gradients_are_those_of_the_pairs_one_by_one_in_a_plain_model(tokenizers, tiny, how):
    tokenizer = tokenizers["bos"]
    tokenizer.chat_template = CHATS.get(how)
    torch.manual_seed(0)
    lm = add_lora(copy.deepcopy(tiny[0]), 4, 8, 0.0, trained_rows=range(len(tokenizer)))
    for name, weight in lm.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    prompts = Prompts("chat" if how in CHATS else how)
    samples = [(codes(1), [VERIFY, QUERY, REPORT]), (codes(2), [COMPARE, VERIFY])]
    groups = [group for ecgs, tasks in samples for group in task_groups(tokenizer, tiny[2], prompts, ecgs, META, tasks)]
    packed = PackedLM(lm)
    packed(pack(groups)).backward()
    together = {name: weight.grad.clone() for name, weight in lm.named_parameters() if weight.requires_grad}
    loss = packed(pack(groups)).item()
    lm.zero_grad()
    alone = 0.0
    with plain_attention(lm):
        for group in groups:
            for ids, target in whole(group):
                logits = lm(input_ids=torch.from_numpy(ids)[None], use_cache=False).logits[0, :-1]
                labels = torch.from_numpy(np.where(target, ids, -100))[1:]
                one = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
                one.backward()
                alone += one.item()
    targets = sum(int(target.sum()) for group in groups for _, target in whole(group))
    assert abs(loss - alone) / targets < 1e-5
    for name, weight in lm.named_parameters():
        if weight.requires_grad:
            assert (together[name] - weight.grad).abs().max() / targets < 1e-5, name
