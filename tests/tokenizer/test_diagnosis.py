"""The super-classes against PTB-XL's own table, features against a slow convolution, AUROC against sklearn, and a drop that is known."""

import numpy as np
import pandas as pd
import pytest
from scipy.signal import resample_poly
from sklearn.metrics import roc_auc_score

from toolkit.tokenizer.diagnosis import (
    DILATIONS,
    KERNEL,
    PER_DILATION,
    SUPERCLASS_OF,
    SUPERCLASSES,
    _kernels,
    aurocs,
    features,
    information,
    resampled_aurocs,
    scores,
    superclasses,
)


def ecgs(seed=0, n=2) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, 12, 5000)).cumsum(-1).astype(np.float32) / 50


def test_superclasses_are_those_of_scp_statements(ecg_data):
    table = pd.read_csv(ecg_data / "ptbxl" / "scp_statements.csv", index_col=0)
    table = table[table["diagnostic"] == 1]
    assert len(table) == 44 and SUPERCLASS_OF == table["diagnostic_class"].to_dict()


def test_superclasses_of_an_ecg():
    def names(*codes: str) -> list[str]:
        return [name for name, has in zip(SUPERCLASSES, superclasses(list(codes))) if has]

    assert names("NORM", "SR") == ["NORM"]
    assert names("LVH", "IMI", "AMI", "PVC") == ["MI", "HYP"]
    assert names("SR", "AFIB", "426783006") == names() == []


def test_features_are_shares_above_zero_and_maxima_of_the_convolutions():
    """One kernel of each dilation by numpy, sample by sample of its 9 taps."""
    ecg = ecgs()
    found = features(ecg)
    assert found.shape == (2, 2 * len(DILATIONS) * PER_DILATION) and found.dtype == np.float32
    x = resample_poly(ecg[1].astype(float) - ecg[1].mean(-1, keepdims=True), 1, 5, axis=-1)
    x = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)
    for i, (dilation, weights, biases) in enumerate(_kernels(0)):
        reach = KERNEL // 2 * dilation
        padded, kernel = np.pad(x, ((0, 0), (reach, reach))), weights[7].double().numpy()
        y = sum(kernel[:, tap] @ padded[:, tap * dilation : tap * dilation + 1000] for tap in range(KERNEL)) + float(biases[7])
        start = 2 * i * PER_DILATION
        assert found[1, start + 7] == pytest.approx((y > 0).mean(), abs=0.002)
        assert found[1, start + PER_DILATION + 7] == pytest.approx(y.max(), rel=1e-4)


def test_features_know_neither_amplitude_nor_the_batch():
    ecg = ecgs(1, 3)
    np.testing.assert_allclose(features(7 * ecg - 2), features(ecg), atol=2e-3)
    np.testing.assert_allclose(np.concatenate([features(ecg[:1]), features(ecg[1:])]), features(ecg), atol=2e-3)
    with pytest.raises(ValueError, match=r"expected \[N, 12, 5000\]"):
        features(ecg[:, :, :1000])


def test_resampled_aurocs_are_those_of_sklearn_with_weights():
    rng = np.random.default_rng(0)
    labels = rng.random((60, 3)) < 0.3
    judged = np.round(labels + rng.normal(0, 1, (60, 3)), 1)  # rounded: ties
    times = rng.multinomial(60, np.full(60, 1 / 60), 20)
    expected = [[roc_auc_score(labels[:, i], judged[:, i], sample_weight=weights) for i in range(3)] for weights in times]
    np.testing.assert_allclose(resampled_aurocs(judged, labels, times), expected, atol=1e-6)
    np.testing.assert_allclose(resampled_aurocs(judged, labels, np.ones((1, 60), int))[0], aurocs(judged, labels), atol=1e-6)
    nobody = np.where(labels[:, 0], 0, 1)[None]
    assert np.isnan(resampled_aurocs(judged, labels, nobody)[0, 0])


def part(seed: int, n: int, noise: float) -> dict[str, np.ndarray]:
    """Features of which the first five are the labels; `reconstructions` see them through noise. The last class is nobody's."""
    rng = np.random.default_rng(seed)
    labels = rng.random((n, 5)) < 0.4
    labels[:, 4] = False
    originals = np.concatenate([labels + rng.normal(0, 0.05, (n, 5)), rng.normal(0, 1, (n, 5))], 1)
    reconstructions = originals + noise * rng.normal(0, 1, originals.shape)
    return {"originals": originals, "reconstructions": reconstructions, "labels": labels, "patient": np.array([f"p{i // 2}" for i in range(n)])}


def test_information_lost_is_the_drop():
    found = information(part(0, 400, 2.0), part(1, 200, 2.0))
    assert found["originals"]["macro_auroc"] > 0.99 and 0.5 < found["reconstructions"]["macro_auroc"] < 0.8
    assert found["drop"]["macro_auroc"] == pytest.approx(found["originals"]["macro_auroc"] - found["reconstructions"]["macro_auroc"])
    low, high = found["drop_interval"]
    assert 0.1 < low < found["drop"]["macro_auroc"] < high
    assert list(found["cases"]) == list(SUPERCLASSES[:4])  # nobody has the fifth
    assert found["originals"]["macro_auroc"] == pytest.approx(np.mean([found["originals"][name] for name in SUPERCLASSES[:4]]))
    labelled = part(1, 200, 2.0)["labels"].any(1).sum()
    assert found["ecgs"] == labelled < 200


def test_no_information_lost_is_no_drop():
    found = information(part(0, 100, 0.0), part(1, 60, 0.0))
    assert found["drop"]["macro_auroc"] == 0 and found["drop_interval"] == [0, 0]


def test_what_cannot_be_judged_is_said():
    train, test = part(0, 100, 0.0), part(1, 40, 0.0)
    test["labels"][:] = False
    assert "no PTB-XL super-class" in information(train, test)["skipped"]
    test["labels"][:, 0] = True  # all have it: no control to tell them from
    assert "no PTB-XL super-class" in information(train, test)["skipped"]
    judged = scores(train["originals"], train["labels"], test["originals"])
    assert np.isnan(judged[:, 4]).all() and np.isfinite(judged[:, :4]).all()


def test_the_classifier_reads_real_ecgs(ecg_data):
    """Normal against bundle branch block: 15 of each to learn from, 10 to judge; 0.5 is chance."""
    from toolkit.ecg.quality import read_checked

    table = pd.read_csv(ecg_data / "ptbxl" / "ptbxl_database.csv")
    chosen = [table[table["scp_codes"].str.contains(code)].head(25) for code in ("'NORM'", "'CLBBB'|'CRBBB'")]
    found = [features(np.stack([read_checked(ecg_data / "ptbxl" / name)[0] for name in rows["filename_hr"]])) for rows in chosen]
    train, test = np.concatenate([x[:15] for x in found]), np.concatenate([x[15:] for x in found])
    judged = scores(train, np.repeat([[True], [False]], 15, 0), test)
    assert aurocs(judged, np.repeat([[True], [False]], 10, 0))[0] > 0.9
