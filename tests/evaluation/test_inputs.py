"""What stands in for an ECG."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit.ecg.noise import add_noise
from toolkit.evaluation.inputs import FLAT, SHUFFLED, Inputs, noise_name, other_patients


@given(st.lists(st.lists(st.sampled_from("abcde"), min_size=1, max_size=2), min_size=1, max_size=60), st.integers(0, 9))
def test_a_donor_has_none_of_the_patients_and_is_drawn_by_the_seed(patients, seed):
    n_ecgs = list(map(len, patients))
    donors = other_patients(patients, n_ecgs, seed)
    for i, donor in enumerate(donors):
        others = [j for j, some in enumerate(patients) if len(some) == n_ecgs[i] and not set(some) & set(patients[i])]
        assert donor in others if others else donor == -1
    assert (donors == other_patients(patients, n_ecgs, seed)).all()


def test_each_ecg_of_its_own_patient_stands_in_once():
    patients = [(str(i),) for i in range(500)]
    donors = other_patients(patients, [1] * 500, 3)
    assert sorted(donors) == list(range(500)) and (donors != np.arange(500)).all()
    assert (donors != other_patients(patients, [1] * 500, 4)).any()


class Shards:
    """Two samples of two ECGs."""

    folder, index = "nowhere", {"manifest": "gone"}
    metas = [{"gains": [[0.1] * 12, [0.2] * 12], "record_ids": ["1", "2"], "source": "own", "ages": [40.0, 41.0]},
             {"gains": [[0.3] * 12, [0.4] * 12], "record_ids": ["3", "4"], "source": "own", "ages": [70.0, 71.0]}]  # fmt: skip

    def ids(self, i):
        return np.full((2, 313), i, np.uint16)

    def meta(self, i):
        return dict(self.metas[i])


class Tokenizer:
    """Codes that say the sum of squares of a lead in mV, so that a test can tell which ECG they were made from."""

    def encode(self, ecgs):
        return np.repeat(np.square(ecgs[:, 0]).sum(-1, keepdims=True), 313, 1).astype(np.uint16)


def test_own_shuffled_and_flat():
    inputs = Inputs(Shards(), Tokenizer(), None, np.array([1, 0]), seed=0)
    codes, meta = inputs.of(None, 0)
    assert (codes == 0).all() and meta == Shards.metas[0]
    codes, meta = inputs.of(SHUFFLED, 0)
    assert (codes == 1).all() and meta == Shards.metas[0] | {"gains": Shards.metas[1]["gains"]}  # the words about the patient stay
    codes, meta = inputs.of(FLAT, 1)
    assert codes.shape == (2, 313) and (codes == 0).all() and meta == Shards.metas[1] | {"gains": [[1e-3] * 12] * 2}


def test_noise_is_drawn_by_sample_and_the_same_at_every_level(monkeypatch):
    rng = np.random.default_rng(1)
    ecgs = rng.standard_normal((2, 12, 5000)).astype(np.float32)
    inputs = Inputs(Shards(), Tokenizer(), None, np.array([1, 0]), seed=0)
    monkeypatch.setattr(inputs, "_read", lambda source, record: ecgs[int(record) - 1])
    found = {level: inputs.of(level, 0) for level in (0.0, 20.0)}
    added = {level: np.stack([add_noise(ecgs[n], _kind(0, n), level, _rng(0, n)) for n in range(2)]) for level in found}
    for level, (codes, meta) in found.items():
        assert (codes == Tokenizer().encode(added[level])).all()
        assert meta["gains"][0][0] == pytest.approx(added[level][0, 0].std(), rel=1e-3) and meta["ages"] == [40.0, 41.0]
    assert np.allclose((added[0.0] - ecgs) / 10, added[20.0] - ecgs, atol=1e-4)
    assert noise_name(10.0) == "noise 10 dB" and noise_name(2.5) == "noise 2.5 dB"


def _rng(i, n):
    rng = np.random.default_rng((0, i, n))
    rng.integers(5)
    return rng


def _kind(i, n):
    return ("wander", "muscle", "motion", "mains50", "mains60")[np.random.default_rng((0, i, n)).integers(5)]
