"""The canonical ECG array: float32 [12, 5000], mV, 500 Hz, 10 s, leads by name in this order.

MIMIC-IV-ECG files store aVF before aVL and PTB-XL writes AVR, so every reader goes through `lead_order`.
"""

LEADS = ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")
SAMPLING_RATE = 500  # Hz
DURATION = 10  # s
SAMPLES = SAMPLING_RATE * DURATION


def lead_order(names: list[str]) -> list[int | None]:
    """Index of each canonical lead in `names` (case-insensitive), or None where the record lacks it."""
    where = {name.strip().lower(): i for i, name in reversed(list(enumerate(names)))}
    return [where.get(lead.lower()) for lead in LEADS]
