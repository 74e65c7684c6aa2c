"""What a tokenizer keeps of an ECG, in numbers: pure functions over arrays, numpy alone.

Everything is relative to the lead: errors are divided by the variance of the original's lead, so that a z-scored dataset and one in mV give the same figures.
A lead that does not move (SD under 1 uV: missing or flat) has no variance to compare with and is left out of its ECG's means.
"""

import numpy as np

from toolkit.ecg.leads import LEADS, SAMPLING_RATE

FLAT = 1e-3  # mV, the floor of the tokenizer's own scaling
# Hz. Baseline; P, T and the rate; the bulk of the QRS; its edges and notches; muscle and mains; what is left up to Nyquist.
BANDS = ((0, 0.67), (0.67, 5), (5, 15), (15, 40), (40, 100), (100, 250))
BAND_NAMES = tuple(f"{low:g}-{high:g} Hz" for low, high in BANDS)
EMPTY = 1e-5  # of a lead's energy: a band with less was filtered out upstream, and whatever the tokenizer leaves there would be millions of percent of it


def ecg_metrics(original: np.ndarray, reconstruction: np.ndarray) -> dict[str, np.ndarray]:
    """Each ECG's figures, for `original` and `reconstruction` float [N, 12, 5000] in the same unit: name -> float64 [N], nan where all leads are flat.

    - `mse`: mean((x - y)^2) / var(x) of a lead, mean over leads: the tokenizer's training loss.
    - `prd`, percent: 100 sqrt(sum((x - y)^2) / sum((x - mean(x))^2)) of a lead, mean over leads: the percentage root-mean-square difference with the mean
      removed (PRDN; Zigel et al. 2000, IEEE TBME 47:1422; Blanco-Velasco et al. 2005, Med Eng Phys 27:798, say why it has to be). 100 is a flat line.
    - `correlation/<lead>`: Pearson's r of x and y; 0 where y is constant; `correlation` is their mean.
    - `error/<band>`, `energy/<band>`: energy of y - x and of x - mean(x) in BANDS, in lead variances, mean over leads: squared Fourier coefficients of the
      whole record, so that by Parseval's theorem the bands add up to mse and 1. `band_error` makes ratios of them.

    Raises ValueError for shapes that differ or are no ECGs.
    """
    if original.shape != reconstruction.shape or original.ndim != 3 or original.shape[1] != len(LEADS):
        raise ValueError(f"expected two arrays [N, {len(LEADS)}, samples], got {list(original.shape)} and {list(reconstruction.shape)}")
    x = original.astype(np.float64)
    sd = x.std(-1, keepdims=True)
    flat = sd < FLAT
    x, error = (x - x.mean(-1, keepdims=True)) / np.where(flat, 1, sd), (reconstruction - x) / np.where(flat, 1, sd)

    mse = np.square(error).mean(-1)
    correlation = _pearson(x, x + error)  # shifting and scaling both leaves r as it is
    metrics = {"mse": mse, "prd": 100 * np.sqrt(mse), "correlation": correlation}
    for kind, signal in (("error", error), ("energy", x)):
        samples = signal.shape[-1]
        frequency = np.fft.rfftfreq(samples, 1 / SAMPLING_RATE)
        twice = np.where((frequency == 0) | (frequency == SAMPLING_RATE / 2), 1, 2)  # the coefficients of negative frequencies are not in rfft
        power = np.abs(np.fft.rfft(signal)) ** 2 * twice / samples**2
        for (low, high), name in zip(BANDS, BAND_NAMES):
            inside = (frequency >= low) & ((frequency < high) | (high == SAMPLING_RATE / 2))
            metrics[f"{kind}/{name}"] = power[..., inside].sum(-1)
    alive = ~flat[..., 0]
    result = {name: _mean_over_leads(values, alive) for name, values in metrics.items()}
    for lead, name in enumerate(LEADS):
        result[f"correlation/{name}"] = np.where(alive[:, lead], correlation[:, lead], np.nan)
    return result


def _pearson(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = x - x.mean(-1, keepdims=True), y - y.mean(-1, keepdims=True)
    norm = np.sqrt(np.square(x).sum(-1) * np.square(y).sum(-1))
    return np.divide((x * y).sum(-1), norm, out=np.zeros_like(norm), where=norm > 1e-12)


def _mean_over_leads(values: np.ndarray, alive: np.ndarray) -> np.ndarray:
    count = alive.sum(-1)
    return np.divide(np.where(alive, values, 0).sum(-1), count, out=np.full(len(values), np.nan), where=count > 0)


def summarise(ecgs: dict[str, np.ndarray]) -> dict:
    """One group's figures from those of its ECGs: the names of `ecg_metrics` and of `toolkit.ecg.beats.compare_beats` -> float [n].

    `band_mse` is each band's part of `mse`, `band_energy` its part of the originals' energy, `band_error` the first over the second (None where the originals
    have nothing: EMPTY), of all ECGs together: many ECGs have hardly any energy in some band, and a mean of ratios would be theirs. `r_error_ms` weighs each
    matched beat alike, `missed` and `extra` are shares of the originals' beats. None where nothing was to be measured.
    """
    energy, error = ({name: _mean(ecgs[f"{kind}/{name}"]) for name in BAND_NAMES} for kind in ("energy", "error"))
    matched = ecgs["beats"] - ecgs["missed"]
    seen = np.isfinite(ecgs["r_error_ms"]) & (matched > 0)
    return {
        "ecgs": len(ecgs["mse"]),
        **{name: _number(_mean(ecgs[name])) for name in ("mse", "prd", "correlation")},
        "correlation_by_lead": {lead: _number(_mean(ecgs[f"correlation/{lead}"])) for lead in LEADS},
        "band_mse": {name: _number(value) for name, value in error.items()},
        "band_energy": {name: _number(value) for name, value in energy.items()},
        "band_error": {name: error[name] / value if value > EMPTY else None for name, value in energy.items()},
        "r_error_ms": _number(_ratio((ecgs["r_error_ms"] * matched)[seen].sum(), matched[seen].sum())),
        "qrs_error_ms": _number(_mean(ecgs["qrs_error_ms"])),
        "missed": _number(_ratio(ecgs["missed"].sum(), ecgs["beats"].sum())),
        "extra": _number(_ratio(ecgs["extra"].sum(), ecgs["beats"].sum())),
    }


def code_usage(counts: np.ndarray, seconds_per_token: float) -> dict:
    """How a vocabulary is used, from how often each of its codes was seen (int [codes]); whole codes, not digits.

    `perplexity` is 2^H with H = -sum p log2 p, `entropy_bits`, over all codes (van den Oord et al. 2017 report it so): `codes` if all are used alike, 1 if one
    is. `bits_per_second` is what the ids take at a fixed length (log2 codes each), `entropy_bits_per_second` what a perfect code that knows no context would
    take. The lead's mean and SD, stored beside the ids, are not in either. Few ECGs cannot use many codes: compare groups of one size.
    """
    p = counts[counts > 0] / max(1, counts.sum())
    entropy = float(-(p * np.log2(p)).sum()) + 0.0  # no -0.0
    return {
        "codes": len(counts),
        "used": len(p),
        "dead": len(counts) - len(p),
        "perplexity": 2**entropy,
        "entropy_bits": entropy,
        "bits_per_second": float(np.log2(len(counts))) / seconds_per_token,
        "entropy_bits_per_second": entropy / seconds_per_token,
    }


def _mean(values: np.ndarray) -> float:
    return _ratio(np.nansum(values), np.isfinite(values).sum())


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator > 0 else np.nan


def _number(value: float) -> float | None:
    """json has no nan."""
    return float(value) if np.isfinite(value) else None
