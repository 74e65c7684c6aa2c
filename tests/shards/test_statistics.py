"""Entropies of token tables against loops over dictionaries."""

import math
from collections import Counter

import numpy as np
import pytest

from toolkit.shards import statistics
from toolkit.shards.reader import Shards
from toolkit.shards.statistics import bigram_entropy, unigram_entropy
from toolkit.shards.writer import write_index, write_split

CODES = 30


def make(folder, **splits):
    written = {name: write_split(folder, name, [(f"k{i:03d}", ids, {}) for i, ids in enumerate(samples)], 5) for name, samples in splits.items()}
    write_index(folder, written, kind="tokens")
    return [Shards.open(folder, name) for name in splits]


def walks(seed, samples, ecgs, codes=CODES):
    """Steps of -1 to 3 around a ring: neighbours say much of each other. Samples of `ecgs` ECGs of 20 tokens."""
    rng = np.random.default_rng(seed)
    return [(rng.integers(0, codes, (ecgs, 1)) + rng.integers(-1, 4, (ecgs, 20)).cumsum(1)).astype(np.int64) % codes for _ in range(samples)]


def slow_entropies(train, valid):
    """(unigram, bigram) by the book, token by token."""
    unigram, pairs = Counter(range(CODES)), Counter()
    for ecg in (ecg for sample in train for ecg in sample.tolist()):
        unigram.update(ecg)
        pairs.update(zip(ecg[:-1], ecg[1:]))
    alone, given = [], []
    for ecg in (ecg for sample in valid for ecg in sample.tolist()):
        for place, token in enumerate(ecg):
            p = unigram[token] / unigram.total()
            alone.append(math.log(p))
            if place:
                followers = {b: n for (a, b), n in pairs.items() if a == ecg[place - 1]}
                n, t = sum(followers.values()), len(followers)
                p = (followers.get(token, 0) + t * p) / (n + t) if n else p
            given.append(math.log(p))
    return -sum(alone) / len(alone), -sum(given) / len(given)


@pytest.mark.parametrize("ecgs", [1, 2])
def test_entropies_equal_those_of_a_slow_loop(tmp_path, ecgs):
    train, valid = walks(0, 12, ecgs), walks(1, 6, ecgs)
    train = [np.where(sample == 7, 8, sample) for sample in train]  # code 7 has no successor in train
    chosen = [0, 2, 5]
    shards = make(tmp_path, train=[s.astype(np.uint16) for s in train], valid=[s.astype(np.uint16) for s in valid])
    unigram, bigram = slow_entropies(train, [valid[i] for i in chosen])
    assert unigram_entropy(*shards, chosen, CODES) == pytest.approx(unigram, rel=1e-12)
    assert bigram_entropy(*shards, chosen, CODES) == pytest.approx(bigram, rel=1e-12)
    assert bigram < unigram - 0.3


def test_the_pair_probabilities_of_a_token_sum_to_one(tmp_path):
    valid = [np.array([[3, token]], np.uint16) for token in range(CODES)] + [np.array([[3]], np.uint16)]
    shards = make(tmp_path, train=[s.astype(np.uint16) for s in walks(0, 12, 1)], valid=valid)
    first = math.exp(-unigram_entropy(*shards, [CODES], CODES))  # of the ECG that is one 3
    total = sum(math.exp(-2 * bigram_entropy(*shards, [token], CODES)) / first for token in range(CODES))
    assert total == pytest.approx(1, rel=1e-12)


def test_both_read_train_once_and_no_more_of_it_than_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(statistics, "COUNTED", 4)
    train, valid = walks(0, 12, 1), walks(1, 3, 1)
    shards = make(tmp_path, train=[s.astype(np.uint16) for s in train], valid=[s.astype(np.uint16) for s in valid])
    read, ids = [], shards[0].ids
    shards[0].ids = lambda i: (read.append(i), ids(i))[1]
    entropies = unigram_entropy(*shards, [0, 1, 2], CODES), bigram_entropy(*shards, [0, 1, 2], CODES)
    assert entropies == pytest.approx(slow_entropies(train[:4], valid), rel=1e-12)
    assert read == [0, 1, 2, 3]


def test_as_many_codes_as_ids_can_be(tmp_path):
    """A table of all pairs would take 34 GB."""
    samples = [s.astype(np.uint16) for s in walks(0, 4, 1, codes=65_536)]
    shards = make(tmp_path, train=samples, valid=samples)
    assert bigram_entropy(*shards, [0, 1], 65_536) < unigram_entropy(*shards, [0, 1], 65_536)
