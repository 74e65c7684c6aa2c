"""The ECG vocabulary: `<|ecg_start|>`, `<|ecg_end|>`, `<|ecg_0000|>`..`<|ecg_1295|>` as real tokens of a Hugging Face tokenizer.

With gain tokens, `<|gain_00|>`..`<|gain_31|>` as well: the amplitude of a lead, which the codes do not hold (toolkit/ecg/gains.py).
"""

import math

import torch
from tokenizers import AddedToken
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from toolkit.ecg.gains import GAIN_BINS
from toolkit.errors import UserError
from toolkit.tasks.vocabulary import ECGVocabulary

START, END = "<|ecg_start|>", "<|ecg_end|>"
CODE, GAIN = "<|ecg_", "<|gain_"
PAD_TO = 64  # rows of embedding and head: matrix shapes that tensor cores like, and that divide by up to 64 ranks


def ecg_vocabulary(tokenizer: PreTrainedTokenizerBase) -> ECGVocabulary | None:
    """The ECG tokens of a tokenizer, or None if it has none. Raises ValueError if they, or the gain tokens, are not contiguous."""
    added = tokenizer.get_added_vocab()
    codes, gains = _numbered(added, CODE), _numbered(added, GAIN)
    if START not in added or not codes:
        return None
    return ECGVocabulary(added[START], added[END], codes[0], len(codes), gains[0] if gains else None)


def _numbered(added: dict[str, int], name: str) -> list[int]:
    """Ids of the tokens `name` + number + `|>`, in order of the numbers (as text, 10000 would stand before 9999)."""
    ids = {int(token[len(name) : -2]): id for token, id in added.items() if token.startswith(name) and token[len(name) : -2].isdigit()}
    ordered = [ids[number] for number in sorted(ids)]
    if ordered and ordered != list(range(ordered[0], ordered[0] + len(ordered))):
        raise ValueError(f"the tokens {name}...|> of this tokenizer are not contiguous")
    return ordered


def extend(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, levels: list[int], seed: int, knows_text: bool, gain_tokens: bool = False
) -> ECGVocabulary:
    """Add the ECG tokens, and if asked the gain tokens, to tokenizer and model, in place; what the pair has already is left as it is.

    levels: of each dimension of the ECG tokenizer, code = sum_i digit_i * prod(levels[:i]).

    A new row starts at the mean of the text rows plus noise that is mostly linear in the code's digits, so that codes one quantisation
    step apart start close to each other: 1,296 unrelated rows would each have to be learnt from few occurrences. The gain tokens lie along
    one line. Raises UserError if the model knows another number of codes.
    """
    # Of the text rows' own spread. At 1 a new row of SmolLM2's tied head outscores the right next word by chance; at 0.5 the best of the
    # 1,298 stays 9 logits below it. Rows beside text that was never trained need no such care.
    spread = 0.5 if knows_text else 1.0
    codes, known = math.prod(levels), ecg_vocabulary(tokenizer)
    if known and known.codes != codes:
        raise UserError(f"--backbone: has {known.codes} ECG codes, the shards' tokenizer has {codes}; use the shards it was trained on")
    add_gains = gain_tokens and not (known and known.gain_first is not None)
    if known and not add_gains:
        return known
    text_rows = model.get_input_embeddings().weight.shape[0]
    names = [] if known else [START, END] + [f"{CODE}{code:04d}|>" for code in range(codes)]
    names += [f"{GAIN}{number:02d}|>" for number in range(GAIN_BINS * add_gains)]
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in names], special_tokens=True)
    vocabulary = ecg_vocabulary(tokenizer)
    needed = max(len(tokenizer), text_rows)
    with torch.random.fork_rng(devices=[]):  # the rows of padding are in the softmax: without a seed no two runs had the same losses (1e-3 apart)
        torch.manual_seed(seed)
        model.resize_token_embeddings(-(-needed // PAD_TO) * PAD_TO, mean_resizing=False)
    generator = torch.Generator().manual_seed(seed)
    weights = [model.get_input_embeddings().weight]
    head = model.get_output_embeddings().weight
    if head is not weights[0]:
        weights.append(head)
    with torch.no_grad():
        for weight in weights:
            text, width = weight[: vocabulary.start].float(), weight.shape[1]
            mean = text.mean(0)
            std = spread * (text - mean).std()
            if not known:
                rows = _ordered_rows(levels, 0.44, width, generator)
                edges = torch.randn(2, width, generator=generator)
                weight[vocabulary.start : vocabulary.end + 1] = (mean + std * edges).to(weight.dtype)
                weight[vocabulary.first : vocabulary.first + codes] = (mean + std * rows).to(weight.dtype)
            if add_gains:  # less noise: 32 rows on one axis are a ninth of its spread apart
                rows = _ordered_rows([GAIN_BINS], 0.1, width, generator)
                weight[vocabulary.gain_first : vocabulary.gain_first + GAIN_BINS] = (mean + std * rows).to(weight.dtype)
    return vocabulary


def _ordered_rows(levels: list[int], noise: float, width: int, generator: torch.Generator) -> torch.Tensor:
    """[prod(levels), width] of variance 1: linear in the digits of each row's number, and a share of `noise` of its own."""
    size = torch.tensor(levels)
    digits = torch.arange(math.prod(levels))[:, None] // (size.cumprod(0) // size) % size
    digits = (digits - (size - 1) / 2) / ((size**2 - 1) / 12).sqrt()  # mean 0, variance 1
    axes = torch.randn(len(levels), width, generator=generator)
    own = torch.randn(len(digits), width, generator=generator)
    return (1 - noise**2) ** 0.5 * (digits @ axes) / len(levels) ** 0.5 + noise * own
