"""The ECG vocabulary: `<|ecg_start|>`, `<|ecg_end|>`, `<|ecg_0000|>`..`<|ecg_1295|>` as real tokens of a Hugging Face tokenizer."""

import torch
from tokenizers import AddedToken
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from toolkit.errors import UserError
from toolkit.tasks.vocabulary import ECGVocabulary

START, END = "<|ecg_start|>", "<|ecg_end|>"
PAD_TO = 64  # rows of embedding and head: matrix shapes that tensor cores like, and that divide by up to 64 ranks


def ecg_vocabulary(tokenizer: PreTrainedTokenizerBase) -> ECGVocabulary | None:
    """The ECG tokens of a tokenizer, or None if it has none. Raises ValueError if they are not contiguous."""
    added = tokenizer.get_added_vocab()
    names = sorted(name for name in added if name.startswith("<|ecg_") and name[6:-2].isdigit())
    if START not in added or not names:
        return None
    first = added[names[0]]
    if [added[n] for n in names] != list(range(first, first + len(names))):
        raise ValueError("the ECG tokens of this tokenizer are not contiguous")
    return ECGVocabulary(added[START], added[END], first, len(names))


def extend(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, levels: int, dims: int, seed: int, knows_text: bool) -> ECGVocabulary:
    """Add the ECG tokens to tokenizer and model, in place; a pair that has them already is left as it is.

    A new row starts at the mean of the text rows plus noise that is mostly linear in the code's digits, so that codes one quantisation
    step apart start close to each other: 1,296 unrelated rows would each have to be learnt from few occurrences.
    """
    # Of the text rows' own spread. At 1 a new row of SmolLM2's tied head outscores the right next word by chance; at 0.5 the best of the
    # 1,298 stays 9 logits below it. Rows beside text that was never trained need no such care.
    spread = 0.5 if knows_text else 1.0
    known = ecg_vocabulary(tokenizer)
    if known is not None:
        if known.codes != levels**dims:
            raise UserError(f"--backbone: has {known.codes} ECG codes, the shards' tokenizer has {levels**dims}; use the shards it was trained on")
        return known
    text_rows = model.get_input_embeddings().weight.shape[0]
    names = [START, END] + [f"<|ecg_{code:04d}|>" for code in range(levels**dims)]
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in names], special_tokens=True)
    vocabulary = ecg_vocabulary(tokenizer)
    needed = max(len(tokenizer), text_rows)
    model.resize_token_embeddings(-(-needed // PAD_TO) * PAD_TO, mean_resizing=False)
    generator = torch.Generator().manual_seed(seed)
    digits = torch.arange(levels**dims)[:, None] // levels ** torch.arange(dims) % levels
    digits = (digits - (levels - 1) / 2) / ((levels**2 - 1) / 12) ** 0.5  # mean 0, variance 1
    weights = [model.get_input_embeddings().weight]
    head = model.get_output_embeddings().weight
    if head is not weights[0]:
        weights.append(head)
    with torch.no_grad():
        for weight in weights:
            text = weight[: vocabulary.start].float()
            mean = text.mean(0)
            std = spread * (text - mean).std()
            axes = torch.randn(dims, weight.shape[1], generator=generator)
            own = torch.randn(levels**dims, weight.shape[1], generator=generator)
            rows = mean + std * (0.9 * (digits @ axes) / dims**0.5 + 0.44 * own)  # 0.9**2 + 0.44**2 = 1
            edges = mean + std * torch.randn(2, weight.shape[1], generator=generator)
            weight[vocabulary.start : vocabulary.end + 1] = edges.to(weight.dtype)
            weight[vocabulary.first : vocabulary.first + vocabulary.codes] = rows.to(weight.dtype)
    return vocabulary
