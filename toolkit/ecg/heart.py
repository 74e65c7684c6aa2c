"""A synthetic 12-lead heart: labelled parameters in, float32 [12, 5000] mV out, about 2 ms a record.

    python -c "import numpy as np; from toolkit.ecg.heart import draw, simulate
    rng = np.random.default_rng(0); heart = draw(rng); print(heart.rhythm, simulate(heart, rng).shape)"

A teaching model, not medical data. The heart is one dipole: every wave of a beat (P, Q, R, S, ST, T, ...) is an asymmetric
Gaussian in time with a direction in space (x to the patient's left, y to the feet, z to the chest), seen by twelve leads.
Amplitudes and intervals follow textbook ranges (e.g. Surawicz & Knilans, Chou's Electrocardiography); within them the
effects are chosen pronounced, so that they survive z-normalisation of each lead and 32 ms tokens.
"""

from dataclasses import dataclass
from math import cos, exp, radians, sin

import numpy as np

from toolkit.ecg.leads import DURATION, SAMPLES, SAMPLING_RATE

RHYTHMS = ("sinus", "bradycardia", "tachycardia", "arrhythmia", "fibrillation", "flutter", "paced")
CONDUCTIONS = ("none", "first_degree", "lbbb", "rbbb")
MORPHOLOGIES = ("none", "lvh", "low_voltage", "anterior_mi", "inferior_mi", "t_inversion")
ECTOPIES = ("none", "ventricular", "atrial")
AXES = ("normal", "left", "right")

NORMAL_SHARE = 0.12  # records without any finding, decided first
RHYTHM_SHARE = (0.13, 0.15, 0.165, 0.14, 0.165, 0.15, 0.10)  # of the others
AXIS_DEGREES = {"normal": (20, 65), "left": (-65, -35), "right": (110, 140)}  # deviation begins at -30 and +90

# Directions of I, II, V1..V6 in (x, y, z). The frontal triangle is Einthoven's; V1..V6 turn from right-front to left.
_CHEST_DEGREES = np.radians([115, 95, 75, 55, 25, 0])
_CHEST_GAIN = np.array([0.9, 1.25, 1.3, 1.3, 1.15, 0.95])
_FRONTAL = np.array([[1.0, 0.0, 0.0], [0.5, 0.866, 0.0]])
_CHEST = np.stack([np.cos(_CHEST_DEGREES), np.array([-0.1, -0.05, 0.0, 0.1, 0.12, 0.12]), np.sin(_CHEST_DEGREES)], axis=1)
_TIME = np.arange(SAMPLES) / SAMPLING_RATE


@dataclass(frozen=True)
class Heart:
    """What one record shows (labels) and how (numbers). Labels take the values of RHYTHMS, CONDUCTIONS, ..."""

    rhythm: str
    conduction: str
    morphology: str
    ectopy: str
    axis: str
    rate: float  # ventricular beats a minute
    axis_degrees: float  # frontal QRS axis
    pr: float  # s, P onset to QRS onset
    qtc: float  # s, Bazett
    modulation: float  # relative swing of RR with breathing
    ratio: int  # flutter waves to a beat
    ectopics: int  # extrasystoles in the 10 s
    wander: float  # mV, baseline, of an electrode
    muscle: float  # mV, white noise of an electrode
    mains: float  # mV, 50 Hz of an electrode
    nature: tuple[float, ...]  # 24 standard normal numbers: what distinguishes one patient's waves from another's

    @property
    def is_normal(self) -> bool:
        """True where PTB-XL would say NORM: an unhurried sinus rhythm and no other finding."""
        calm = self.rhythm in ("sinus", "bradycardia", "arrhythmia")
        return calm and (self.conduction, self.morphology, self.ectopy, self.axis) == ("none", "none", "none", "normal")


def _labels(rng: np.random.Generator) -> tuple[str, str, str, str, str]:
    if rng.random() < NORMAL_SHARE:
        return rng.choice(["sinus", "bradycardia", "arrhythmia"], p=[0.7, 0.15, 0.15]).item(), "none", "none", "none", "normal"
    while True:
        rhythm = RHYTHMS[rng.choice(7, p=RHYTHM_SHARE)]
        if rhythm == "paced":  # pacing hides every other finding
            return rhythm, "none", "none", "none", "normal"
        calm = rhythm in ("sinus", "bradycardia", "arrhythmia")  # a P wave, and room for a long PR before it
        conduction = CONDUCTIONS[rng.choice(4, p=[0.46, 0.28, 0.13, 0.13] if calm else [0.74, 0, 0.13, 0.13])]
        if conduction == "lbbb":  # its own ST-T hides infarction, strain and T inversion
            morphology = rng.choice(["none", "low_voltage"], p=[0.8, 0.2]).item()
        elif conduction == "rbbb":  # R' in V1 removes the voltage criterion
            morphology = MORPHOLOGIES[rng.choice(6, p=[0.40, 0, 0.12, 0.16, 0.16, 0.16])]
        else:
            morphology = MORPHOLOGIES[rng.choice(6, p=[0.26, 0.18, 0.14, 0.14, 0.14, 0.14])]
        steady = rhythm in ("sinus", "bradycardia", "tachycardia")  # elsewhere a narrow early beat is no finding
        ectopy = ECTOPIES[rng.choice(3, p=[0.58, 0.17, 0.25] if steady else [0.83, 0.17, 0])]
        leftward = conduction == "lbbb" or morphology == "lvh"
        axis = AXES[rng.choice(3, p=[0.6, 0.4, 0] if leftward else [0.38, 0.29, 0.33])]
        if not (calm and (conduction, morphology, ectopy, axis) == ("none", "none", "none", "normal")):
            return rhythm, conduction, morphology, ectopy, axis


def draw(rng: np.random.Generator) -> Heart:
    """A heart from the structured distribution: one rhythm, at most one finding of each other kind."""
    rhythm, conduction, morphology, ectopy, axis = _labels(rng)
    ratio = int(rng.choice([2, 3, 4], p=[0.3, 0.2, 0.5]))
    low, high = {
        "bradycardia": (38, 52), "tachycardia": (108, 145), "arrhythmia": (60, 85), "fibrillation": (72, 115),
        "flutter": (260 / ratio, 330 / ratio), "paced": (60, 80),
    }.get(rhythm, (60, 84 if conduction == "first_degree" else 95))  # fmt: skip
    pr = rng.uniform(0.26, 0.36) if conduction == "first_degree" else rng.uniform(0.13, 0.18)
    rare = rhythm in ("bradycardia", "arrhythmia", "fibrillation")  # too few beats in 10 s for three
    return Heart(
        rhythm, conduction, morphology, ectopy, axis,
        rate=rng.uniform(low, high),
        axis_degrees=rng.uniform(*AXIS_DEGREES[axis]),
        pr=pr,
        qtc=rng.uniform(0.37, 0.43),
        modulation=rng.uniform(0.20, 0.30) if rhythm == "arrhythmia" else 0.015,
        ratio=ratio,
        ectopics=0 if ectopy == "none" else int(rng.integers(1, 3 if rare else 4)),
        wander=rng.uniform(0.02, 0.08),
        muscle=rng.uniform(0.006, 0.018),
        mains=rng.uniform(0.0, 0.006),
        nature=tuple(rng.standard_normal(24).tolist()),
    )  # fmt: skip


def _beats(heart: Heart, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """R times (s) and kinds of the beats: "s"inus or conducted, "v"entricular, "a"trial extrasystole."""
    mean = 60 / heart.rate
    count = int(14 / mean) + 4
    if heart.rhythm == "fibrillation":  # CV about 0.25, as measured in AF; the floor is the AV node's refractory time
        rr = np.clip(mean * rng.gamma(16, 1 / 16, count), 0.36, 1.6 * mean)
    else:
        jitter = 0.003 if heart.rhythm in ("flutter", "paced") else 0.012
        rr = mean * (1 + jitter * rng.standard_normal(count))
    times = rng.uniform(-0.4, 0.4) * mean + np.concatenate([[0.0], np.cumsum(rr)])
    if heart.rhythm == "arrhythmia":  # RR follows the breath, 10-15 a minute
        breath, phase = rng.uniform(0.16, 0.25), rng.uniform(0, 2 * np.pi)
        for i in range(1, len(times)):
            swing = heart.modulation * sin(2 * np.pi * breath * times[i - 1] + phase)
            times[i] = times[i - 1] + rr[i - 1] * (1 + swing)
    kinds = np.full(len(times), "s")

    if heart.ectopics:
        # Away from the edges, so that the pause is seen; every other beat at most. At RR <= 1.6 s the window holds >= 4.
        free = rng.permutation(np.flatnonzero((times > 1.0) & (times < 8.4) & (np.arange(len(times)) > 0)))
        chosen: list[int] = []
        for i in free:
            if len(chosen) < heart.ectopics and all(abs(i - j) > 1 for j in chosen):
                chosen.append(int(i))
        assert len(chosen) == heart.ectopics, heart
        for i in sorted(chosen):
            before = times[i] - times[i - 1]
            early = rng.uniform(0.55, 0.66) * before
            early = max(early, min(0.36, 0.75 * before))
            times[i] = times[i - 1] + early
            if heart.ectopy == "atrial":  # resets the sinus node: the pause is a little more than one RR
                kinds[i] = "a"
                times[i + 1 :] += times[i] + rng.uniform(1.1, 1.25) * mean - times[i + 1]
            else:  # the sinus goes on: the pause is fully compensatory
                kinds[i] = "v"
    return times, kinds


def _waves(heart: Heart) -> list[tuple[str, float | None, float, float, np.ndarray]]:
    """(kinds of beat, s after R or None for the T time, left and right width s, direction mV) of every wave."""
    n = heart.nature

    def vary(i: int, spread: float) -> float:  # a patient's own factor, log-normal
        return exp(spread * n[i])

    along = np.array([cos(radians(heart.axis_degrees)), sin(radians(heart.axis_degrees)), 0])
    across = np.array([-along[1], along[0], 0])
    front = np.array([0, 0, 1.0])
    size = vary(0, 0.15)
    wide = vary(1, 0.07)
    q = size * (-0.18 * along + 0.06 * n[2] * across + 0.28 * vary(3, 0.2) * front)
    r = size * (1.15 * vary(4, 0.12) * along - 0.10 * front)
    s = size * (-0.18 * along - 0.1 * n[5] * across - 0.50 * vary(6, 0.2) * front)
    t_axis = radians(40 + 10 * n[7])
    t = 0.36 * vary(8, 0.2) * np.array([cos(t_axis), sin(t_axis), 0.6 + 0.1 * n[9]])
    st = np.zeros(3)
    t_left, t_right = 0.052 * vary(10, 0.08), 0.036 * vary(11, 0.08)
    late = 0.0  # s, T comes later where the QRS is wide
    strength = vary(12, 0.12)

    if heart.conduction == "lbbb" or heart.rhythm == "paced":
        # Two humps 54 ms apart make the notch; no septal q. Pacing from the right apex runs upwards and to the back.
        main = along - 0.55 * front
        if heart.rhythm == "paced":
            main = np.array([0.35 + 0.1 * n[13], -0.9, -0.65])
        main, late = 1.05 * size * main, 0.05
        qrs = [("sa", -0.018 * wide, 0.018, 0.022, 0.85 * main), ("sa", 0.036 * wide, 0.022, 0.019, 0.95 * main * vary(14, 0.08))]
        st, t = -0.20 * strength * main, -0.42 * strength * main
    else:
        if heart.morphology == "lvh":  # Sokolow: S V1 + R V5 > 3.5 mV, and strain
            r, s = 1.9 * strength * r, 1.9 * strength * s - 0.2 * front
            st, t = -0.18 * strength * np.array([0.9, 0.3, -0.6]), -0.40 * strength * np.array([0.9, 0.3, -0.5])
            t_left, t_right = 0.070, 0.030
        elif heart.morphology == "anterior_mi":  # ST elevation V1-V4, QS, depression in the inferior leads
            st = 0.38 * strength * np.array([-0.05, -0.40, 1.0])
            q, t = q - 0.60 * front, t + 0.8 * st
        elif heart.morphology == "inferior_mi":  # II III aVF elevated, I aVL and V1-V3 depressed
            st = 0.36 * strength * np.array([-0.45, 1.0, -0.35])
            q, t = q + np.array([0.05, -0.45, 0]), t * [0.5, 0.5, 0.8] + 0.8 * st
        elif heart.morphology == "t_inversion":  # symmetric and deep, V2-V6, I, aVL
            t = -0.55 * strength * np.array([0.7, 0.25, 0.65])
            t_left = t_right = 0.045
        qrs = [("sa", -0.028 * wide, 0.009, 0.009, q), ("sa", 0.0, 0.012 * wide, 0.012 * wide, r)]
        if heart.conduction == "rbbb":  # the right ventricle last: R' in V1, broad S in I and V6
            qrs.append(("sa", 0.026, 0.009, 0.009, 0.5 * s))
            qrs.append(("sa", 0.066 * wide, 0.016, 0.022, size * strength * np.array([-0.62, 0.0, 0.85])))
            late = 0.04
            if heart.morphology in ("none", "low_voltage"):
                t = t - 0.5 * front
        else:
            qrs.append(("sa", 0.028 * wide, 0.010, 0.010, s))

    volts = 0.30 if heart.morphology == "low_voltage" else 1.0
    ventricle = [(k, at, left, right, volts * mv) for k, at, left, right, mv in qrs]
    ventricle.append(("sa", 0.085 + late, 0.022, 0.080, volts * st))
    ventricle.append(("sa", None, t_left, t_right, max(volts, 0.5) * t * (0.6 if heart.rhythm == "flutter" else 1.0)))
    # Ventricular extrasystole: from the right (n > 0) or left ventricle, wide, T opposite to the QRS.
    origin = np.array([0.6, 0.9, -1.0]) if n[15] > 0 else np.array([-0.9, 0.5, 1.1])
    origin = max(volts, 0.5) * 1.25 * vary(16, 0.15) * origin
    ectopic = [("v", -0.01, 0.028, 0.028, origin), ("v", 0.055, 0.024, 0.030, 0.6 * origin), ("v", 0.30, 0.07, 0.05, -0.45 * origin)]

    atrium = []
    if heart.rhythm == "paced":  # 2 ms stimulus, some 90 ms before the peak
        atrium = [("s", -0.085, 0.0012, 0.0012, np.array([0.5, 1.0, 0.9]) * 1.1 * vary(17, 0.2))]
    elif heart.rhythm not in ("fibrillation", "flutter"):
        p = 0.17 * max(volts, 0.6) * vary(18, 0.15) * np.array([0.6, 0.85, 0.25 + 0.1 * n[19]])
        start = 0.045 if heart.conduction != "lbbb" else 0.07  # QRS onset to R
        atrium = [("s", -heart.pr - start + 0.05, 0.018, 0.020, p), ("a", -0.125, 0.016, 0.016, p * [-0.6, -1.1, 1.0])]
    return ventricle + ectopic + atrium


def _course(centre: np.ndarray, left: float, right: float, gain: np.ndarray) -> np.ndarray:
    """Sum of one wave over beats: [5000]. Only 4 widths around each centre (s) are computed."""
    reach = int(4 * max(left, right) * SAMPLING_RATE) + 1
    index = np.rint(centre * SAMPLING_RATE).astype(np.int64)[:, None] + np.arange(-reach, reach + 1)
    away = index / SAMPLING_RATE - centre[:, None]
    value = gain[:, None] * np.exp(-0.5 * (away / np.where(away < 0, left, right)) ** 2)
    seen = (index >= 0) & (index < SAMPLES)
    return np.bincount(index[seen], value[seen], minlength=SAMPLES)


def _atrial_activity(heart: Heart, rng: np.random.Generator) -> list[tuple[np.ndarray, np.ndarray]]:
    """(time course, direction) of what the atria do all the time: fibrillation or flutter waves."""
    n, volts = heart.nature, 0.7 if heart.morphology == "low_voltage" else 1.0
    if heart.rhythm == "flutter":  # saw-tooth: slow fall, quick rise; inverted in II III aVF, upright in V1
        phase = 2 * np.pi * (heart.rate * heart.ratio / 60 * _TIME + rng.random())
        saw = np.sin(phase) + np.sin(2 * phase) / 2 + np.sin(3 * phase) / 3
        return [(saw, volts * 0.16 * exp(0.15 * n[20]) * np.array([0.05, 1.0, 0.6]))]
    if heart.rhythm == "fibrillation":  # 330-520 a minute, drifting; two sources, so that leads differ
        waves = []
        for i, direction in enumerate(([0.2, 1.0, 0.2], [-0.3, 0.1, 1.0])):
            steps = np.repeat(rng.standard_normal(50), SAMPLES // 50)  # a new speed every 0.2 s
            phase = 2 * np.pi * (np.cumsum(rng.uniform(5.5, 8.5) + 1.2 * steps) / SAMPLING_RATE + rng.random())
            swell = 1 + 0.35 * np.sin(2 * np.pi * rng.uniform(0.3, 0.9) * _TIME + rng.uniform(0, 6.28))
            waves.append((swell * (np.sin(phase) + 0.3 * np.sin(2 * phase)), volts * 0.075 * exp(0.2 * n[21 + i]) * np.array(direction)))
        return waves
    return []


def _electrode_noise(heart: Heart, rng: np.random.Generator) -> np.ndarray:
    """Noise of RA, LA, LL, C1..C6 in mV, [9, 5000]: at the electrodes, so that Einthoven's law holds in the leads."""
    white = rng.standard_normal((9, SAMPLES + 1), dtype=np.float32)
    muscle = heart.muscle * (white[:, 1:] + 0.5 * white[:, :-1])
    hertz = rng.uniform([0.05, 0.15, 0.3], [0.15, 0.3, 0.5])  # breathing and motion
    angle = 2 * np.pi * np.append(hertz, 50.0)[:, None] * _TIME
    waves = np.concatenate([np.sin(angle), np.cos(angle)])
    level = np.tile([heart.wander, heart.wander * 0.6, heart.wander * 0.35, heart.mains], 2)
    return muscle + (rng.standard_normal((9, 8)) * level) @ waves


def simulate(heart: Heart, rng: np.random.Generator) -> np.ndarray:
    """The record: float32 [12, 5000] in mV, leads in the order of `LEADS`. `rng` decides beats and noise only."""
    times, kinds = _beats(heart, rng)
    previous = np.diff(times, prepend=times[0] - 60 / heart.rate)
    gain = 1 + 0.03 * rng.standard_normal(len(times)) + 0.04 * np.sin(2 * np.pi * 0.22 * times)  # breathing moves the heart
    wide = heart.conduction in ("lbbb", "rbbb") or heart.rhythm == "paced"
    t_peak = heart.qtc * np.sqrt(np.clip(previous, 0.36, 1.3)) - 0.10 + 0.04 * wide  # QT by Bazett, T peak 0.1 s before its end

    courses, directions = [], []
    near = (times > -0.6) & (times < DURATION + 0.6)
    for of, at, left, right, direction in _waves(heart):
        mine = near & np.isin(kinds, list(of))
        if mine.any() and direction.any():
            centre = times[mine] + (t_peak[mine] if at is None else at)
            courses.append(_course(centre, left, right, gain[mine]))
            directions.append(direction)
    for course, direction in _atrial_activity(heart, rng):
        courses.append(course)
        directions.append(direction)

    turn = radians(7 * heart.nature[23])  # the heart turned in the chest, and chest electrodes nearer or farther
    spin = np.array([[cos(turn), 0, -sin(turn)], [0, 1, 0], [sin(turn), 0, cos(turn)]])
    chest = (_CHEST_GAIN * (1 + 0.06 * rng.standard_normal(6)))[:, None] * (_CHEST @ spin)
    eight = (np.concatenate([_FRONTAL, chest]) @ np.array(directions).T) @ np.array(courses)

    ra, la, ll, *_ = noise = _electrode_noise(heart, rng)
    one, two = eight[0] + la - ra, eight[1] + ll - ra
    limb = [one, two, two - one, -(one + two) / 2, one - two / 2, two - one / 2]
    return np.concatenate([limb, eight[2:] + noise[3:] - (ra + la + ll) / 3]).astype(np.float32)
