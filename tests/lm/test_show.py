"""What pretraining shows of `tiny`, against `transformers.generate` and the logits of each ECG alone."""

import numpy as np
import pytest
import torch

from toolkit.ecg.plot import GRID, HEIGHT, WIDTH
from toolkit.lm import show
from toolkit.lm.attention import plain_attention
from toolkit.lm.model import PackedLM
from toolkit.shards.reader import Shards
from toolkit.shards.writer import write_index, write_split
from toolkit.tasks.prompts import ecg_ids
from toolkit.tokenizer.tokenizer import ECGTokenizer, TokenizerConfig


@pytest.fixture(autouse=True)
def one_thread():
    """A step of one token is too small for two, which wait for each other where the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Engine(torch.nn.Module):
    """A DeepSpeedEngine as far as `look` knows it."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **more):
        return self.module(*args, **more)


@pytest.fixture
def shards(tmp_path):
    rng = np.random.default_rng(0)
    samples = [(f"ecg_{i}", rng.integers(0, 1296, (1, 313)).astype(np.uint16), {"gains": [[0.1 * (1 + i)] * 12]}) for i in range(5)]
    write_index(tmp_path, {"valid": write_split(tmp_path, "valid", samples, 3)}, kind="tokens")
    return Shards.open(tmp_path, "valid")


@pytest.fixture(scope="module")
def ecg_tokenizer():
    torch.manual_seed(0)
    return ECGTokenizer(TokenizerConfig()).eval()


@pytest.fixture(params=["plain", "gains"])
def language(request, tiny, tiny_with_gains):
    """(engine, tokenizer, vocabulary)"""
    model, tokenizer, vocabulary = tiny_with_gains if request.param == "gains" else tiny
    return Engine(PackedLM(model)), tokenizer, vocabulary


def test_the_text_is_what_generate_predicts(language, shards):
    engine, tokenizer, vocabulary = language
    shown = show.look(engine, tokenizer, vocabulary, shards, None)
    assert shown.images == {}
    others = [i for i in range(engine.module.lm.config.vocab_size) if not 0 <= i - vocabulary.first < vocabulary.codes]
    expected = []
    for i in (0, 2):
        ids = ecg_ids(tokenizer, vocabulary, shards.ids(i), shards.meta(i)["gains"])
        given = torch.from_numpy(ids[: list(ids).index(vocabulary.first + shards.ids(i)[0, 0]) + 100])[None]
        with plain_attention(engine.module.lm) as plain:
            made = plain.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=24, do_sample=False, suppress_tokens=others, pad_token_id=0)
        true, made = shards.ids(i)[0, 100:124], made[0, given.shape[1] :] - vocabulary.first
        expected.append(f"ecg_{i}, after 100 tokens\n\ntrue: {' '.join(map(str, true))}\n\npredicted: {' '.join(map(str, made.tolist()))}")
    assert shown.texts == {"samples": "\n\n".join(expected)}


@pytest.mark.parametrize("head", ["full", "ecg"])
def test_the_histograms_count_true_and_likeliest_codes(language, shards, head):
    engine, tokenizer, vocabulary = language
    ecg = slice(vocabulary.first, vocabulary.first + vocabulary.codes)
    engine = Engine(PackedLM(engine.module.lm, head_rows=range(ecg.start, ecg.stop) if head == "ecg" else None))
    true, predicted = np.zeros(1296, int), np.zeros(1296, int)
    with plain_attention(engine.module.lm) as plain, torch.no_grad():
        for i in (0, 1, 2, 3):
            ids = ecg_ids(tokenizer, vocabulary, shards.ids(i), shards.meta(i)["gains"])[:-1]
            likeliest = plain(input_ids=torch.from_numpy(ids)[None]).logits[0, -314:-1, ecg].argmax(-1)
            np.add.at(true, shards.ids(i)[0], 1)
            np.add.at(predicted, likeliest.numpy(), 1)
    found = show.look(engine, tokenizer, vocabulary, shards, None).histograms
    assert spread(found["tokens/true"], true) == 0
    assert spread(found["tokens/predicted"], predicted) <= 2  # of 1,252: two codes may be equally likely to the last bit


def spread(a, b) -> int:
    return int(np.abs(a - b).sum())


def test_ecgs_are_continued_and_drawn_with_a_line_where_the_model_goes_on(language, shards, ecg_tokenizer, monkeypatch):
    monkeypatch.setattr(show, "GIVEN", 304)  # fewer tokens to make
    engine, tokenizer, vocabulary = language
    first, again = (show.look(engine, tokenizer, vocabulary, shards, ecg_tokenizer).images for _ in range(2))
    assert list(first) == ["continued/1", "continued/2"] and all((first[name] == again[name]).all() for name in first)
    image = first["continued/1"]
    assert image.dtype == np.uint8 and image.shape == (2 * 2 * (HEIGHT + 10), 2 * WIDTH, 3)
    true, made = np.split(image, 2)
    line = round(2 * (20 + 304 * 16 / 500 * 25))  # 2 pixels a millimetre, t = 0 at 20 mm, 25 mm/s
    for page in (true, made):
        column = (page[:, line] == show.MARK).all(-1)
        assert column[2 * (HEIGHT - GRID[3]) : 2 * (HEIGHT - GRID[2])].all()
        assert not (page[:, line - 3] == show.MARK).all(-1).any()
    strip = slice(2 * (HEIGHT - 5), 2 * (HEIGHT - 3))  # the cells of the tokens
    apart = np.abs(true[strip].astype(int) - made[strip]).max((0, 2))  # a page has 256 colours of its own choice
    assert np.median(apart[40 : line - 2]) < 20 < np.median(apart[line + 4 : 2 * 270])


def test_a_sample_follows_the_probabilities(tiny):
    """A step of 1,000 ECGs at once: as often in the likelier half as the softmax over the ECG tokens says."""
    model, tokenizer, vocabulary = tiny
    drawn = show.go_on(model, vocabulary, np.full((1000, 1), tokenizer.bos_token_id), 1, torch.Generator().manual_seed(0))[:, 0]
    with plain_attention(model) as plain, torch.no_grad():
        logits = plain(input_ids=torch.tensor([[tokenizer.bos_token_id]])).logits[0, -1, vocabulary.first : vocabulary.first + vocabulary.codes]
    p = logits.softmax(-1).numpy()
    likely = p > np.median(p)
    assert drawn.shape == (1000,) and 0 <= drawn.min() <= drawn.max() < vocabulary.codes
    assert abs(likely[drawn].mean() - p[likely].sum()) < 4 * 0.5 / 1000**0.5  # four standard errors
    assert abs(p[likely].sum() - 0.5) > 0.02  # or it would not tell


def test_few_samples_are_all_of_them():
    assert [show.spaced(n, 4) for n in (1, 3, 8)] == [[0], [0, 1, 2], [0, 2, 4, 6]]
