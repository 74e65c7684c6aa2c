"""What the encoder knows before it makes codes: its own last layer and the quantiser must make `encode`'s ids of it."""

import numpy as np
import pytest
import torch

from tests.tokenizer.test_tokenizer import KINDS, untrained
from toolkit.tokenizer.fsq import boundary_distance, ids_of
from toolkit.tokenizer.tokenizer import TIE


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request):
    return untrained(KINDS[request.param])


@pytest.fixture(scope="module")
def ecgs():
    return np.random.default_rng(0).standard_normal((5, 12, 5000)).cumsum(-1).astype(np.float32) / 50


def test_codes_are_made_of_features(tokenizer, ecgs):
    before = tokenizer.fingerprint()
    features, layer, levels = tokenizer.features(ecgs), tokenizer.encoder.to_code, tokenizer.config.levels
    assert features.shape == (5, 313, layer.in_features) and features.dtype == np.float32
    with torch.no_grad():
        z = torch.sigmoid(layer(torch.from_numpy(features)))
    clear = (boundary_distance(z, levels) > TIE).all(-1).numpy()  # elsewhere float64 decides
    assert clear.mean() > 0.99 and np.array_equal(ids_of(z, levels).numpy()[clear], tokenizer.encode(ecgs)[clear])
    assert tokenizer.fingerprint() == before and tokenizer.encoder.to_code is layer


def test_features_do_not_depend_on_the_batch_or_what_surrounds_it(tokenizer, ecgs):
    together = tokenizer.features(ecgs)
    with torch.autocast("cpu", torch.bfloat16):
        alone = np.concatenate([tokenizer.features(ecg) for ecg in ecgs])
    assert np.array_equal(alone, together)
    assert tokenizer.features(ecgs[:0]).shape == (0, *together.shape[1:])


def test_what_is_no_ecg_is_refused(tokenizer, ecgs):
    with pytest.raises(ValueError, match="finite"):
        tokenizer.features(np.where(np.arange(5000) == 7, np.nan, ecgs[:1]))
    with pytest.raises(ValueError, match="500 Hz"):
        tokenizer.features(ecgs, 100)
