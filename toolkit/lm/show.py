"""What pretraining shows of itself in TensorBoard: the tokens it predicts, and ECGs that it goes on with, drawn through the decoder."""

import io

import numpy as np
import torch
from PIL import Image
from transformers import DynamicCache

from toolkit.ecg.leads import SAMPLING_RATE
from toolkit.ecg.plot import GRID, HEIGHT, SPEED, TRACE_LEFT, draw_ecg
from toolkit.lm.attention import plain_attention
from toolkit.shards.order import spaced
from toolkit.shards.packing import pack
from toolkit.shards.reader import Shards
from toolkit.shown import Shown
from toolkit.tasks.prompts import ecg_ids, forecast_group
from toolkit.tasks.vocabulary import ECGVocabulary
from toolkit.tokenizer.normalise import STRIDE
from toolkit.tokenizer.tokenizer import ECGTokenizer

GIVEN = 100  # tokens of each ECG, 3.2 s
IN_WORDS = 24  # tokens of the text
DRAWN, COUNTED = 2, 4  # ECGs drawn; ECGs whose tokens are counted: their logits are 0.3 GB for 128,000 words in bf16
DPI = 50.8  # 2 pixels a millimetre
MARK = (0, 150, 80)  # colour of the line where the model goes on


@torch.no_grad()
def look(engine, tokenizer, vocabulary: ECGVocabulary, shards: Shards, ecg_tokenizer: ECGTokenizer | None) -> Shown:
    """Of a `PackedLM` engine in eval mode, on a fixed few ECGs of `shards`. Collective: under ZeRO-3 every forward is.

    texts: true and greedily predicted codes after the first 100. images: the true ECG as its tokens keep it above what the model samples after those
    100, without an `ecg_tokenizer` none. histograms: how often each code occurs, and how often it is the likeliest next one.
    """
    lm = engine.module.lm
    some = spaced(len(shards), DRAWN)
    codes = np.stack([shards.ids(i)[0] for i in some]).astype(np.int64)
    gains = [shards.meta(i)["gains"] for i in some]
    prefixes = np.stack([ecg_ids(tokenizer, vocabulary, shards.ids(i), gain) for i, gain in zip(some, gains)])
    given = prefixes[:, : prefixes.shape[1] - 1 - codes.shape[1] + GIVEN]
    greedy = go_on(lm, vocabulary, given, IN_WORDS)
    texts = [
        f"{shards.key(i)}, after {GIVEN} tokens\n\ntrue: {' '.join(map(str, true[GIVEN : GIVEN + IN_WORDS]))}\n\npredicted: {' '.join(map(str, made))}"
        for i, true, made in zip(some, codes, greedy)
    ]
    images = {}
    if ecg_tokenizer is not None:
        # sampled, not greedy: the likeliest token of an ECG is mostly the flat line, and so the next
        sampled = go_on(lm, vocabulary, given, codes.shape[1] - GIVEN, torch.Generator().manual_seed(0))
        made = np.concatenate([codes[:, :GIVEN], sampled], 1)
        for number, (i, gain, *pair) in enumerate(zip(some, gains, codes, made), 1):
            pages = zip(("true tokens", f"continued by the model from {GIVEN * STRIDE / SAMPLING_RATE:.1f} s on"), pair)
            mv = np.array(gain[0], np.float32)[:, None]
            images[f"continued/{number}"] = np.concatenate([page(ecg_tokenizer.decode(ids) * mv, ids, f"{shards.key(i)}: {what}") for what, ids in pages])
    true, predicted = next_codes(engine, tokenizer, vocabulary, shards)
    counts = {"tokens/true": np.bincount(true, minlength=vocabulary.codes), "tokens/predicted": np.bincount(predicted, minlength=vocabulary.codes)}
    return Shown({"samples": "\n\n".join(texts)}, images, counts)


def go_on(lm, vocabulary: ECGVocabulary, given: np.ndarray, count: int, generator: torch.Generator | None = None) -> np.ndarray:
    """The next `count` codes int64 [B, count] after the token ids `given` int64 [B, n]; ECG tokens alone, sampled with a generator, else the likeliest."""
    made, cache, ids = [], DynamicCache(config=lm.config), torch.from_numpy(given).to(next(lm.parameters()).device)
    with plain_attention(lm):
        for _ in range(count):
            logits = lm(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
            scores = logits[:, vocabulary.first : vocabulary.first + vocabulary.codes].float().cpu()
            chosen = scores.argmax(-1) if generator is None else torch.multinomial(scores.softmax(-1), 1, generator=generator)[:, 0]
            made.append(chosen)
            ids = (chosen[:, None] + vocabulary.first).to(ids.device)
    return torch.stack(made, 1).numpy()


def next_codes(engine, tokenizer, vocabulary: ECGVocabulary, shards: Shards) -> tuple[np.ndarray, np.ndarray]:
    """The true codes int64 [m] of a few ECGs, and the likeliest code at each place given the true ones before it."""
    groups = [forecast_group(tokenizer, vocabulary, shards.ids(i), shards.meta(i)["gains"]) for i in spaced(len(shards), COUNTED)]
    row, rows = pack(groups), engine.module.head_rows
    first = vocabulary.first - (rows.start if rows else 0)
    likeliest = engine(row, logits=True)[:, first : first + vocabulary.codes].argmax(-1)
    return row.targets - vocabulary.first, likeliest.cpu().numpy()


def page(ecg: np.ndarray, ids: np.ndarray, title: str) -> np.ndarray:
    """uint8 [height, width, 3]: an ECG [12, 5000] mV on paper over its tokens, with a line where the model goes on.

    Time runs at the same place in all four rows, so the line is one.
    """
    buffer = io.BytesIO()
    draw_ecg(ecg, buffer, title=title, tokens=ids, dpi=DPI)
    picture = np.array(Image.open(buffer).convert("RGB"))
    pixel = DPI / 25.4
    x = round((TRACE_LEFT + GIVEN * STRIDE / SAMPLING_RATE * SPEED) * pixel)
    top, bottom = (round((HEIGHT - edge) * pixel) for edge in (GRID[3], GRID[2]))
    picture[top:bottom, x : x + 2] = MARK
    return picture
