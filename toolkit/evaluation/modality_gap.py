"""The gap between ECG tokens and text in a model's embedding space, before and after training: numbers (gap.json) and a picture of them (gap.png).

    python -m toolkit.evaluation.modality_gap --before P --after L --shards I --out G
    python -m toolkit.evaluation.modality_gap --before runs/demo/pretrain --after runs/demo/instruct --shards runs/demo/tasks --out runs/demo/gap --samples 20

--before, --after: folders of launchers/pretrain.py or instruct.py, or of `toolkit.lm.merge`; a backbone that was never trained on ECGs is what
`launchers/pretrain.py --max_steps 0` writes. Needs umap-learn (pip install umap-learn). Two spaces:

input                the rows of the input embedding: of the ECG codes and of the text tokens that occur in the samples, each token once
last hidden state    one sample in one pass, asked as --after was tuned to: the mean over its ECG tokens, and the mean over the text of one of its
                     questions (of a sample without questions, of its report). With a prompt that puts the ECG first the text has seen the ECG

The numbers are of the model's own space, never of the picture: UMAP keeps who is near whom, not how far apart clusters are, and its distances change
with its seed. Research software: the numbers describe a model and say nothing of a patient.
"""

import argparse
import json
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sharding.manifest import SPLITS
from toolkit.errors import UserError, exit_2_on_user_error
from toolkit.files import whole_file, write_text
from toolkit.lm.trained import load_trained
from toolkit.shards.order import spaced
from toolkit.shards.reader import Shards
from toolkit.tasks.prompts import Prompts, answer_ids, prompt_ids, shared_ids
from toolkit.tasks.vocabulary import ECGVocabulary
from toolkit.tokenizer.figures import COLOURS

K = 10  # nearest neighbours of the mixing
NEIGHBOURS = 15  # of UMAP, its own default
SEED = 0
SPACES = ("input", "last hidden state")
CONVENTIONS = {
    "centroid_distance": "Euclidean distance between the centroids of ECG and text, over the mean norm of all vectors: 0 where they coincide, 2 at most",
    "centroid_cosine": "cosine of the angle between the two centroids: 1 in the same direction",
    "mixing": f"share of the {K} nearest neighbours (cosine) of a vector that are of the other modality, mean over all vectors, over what chance gives,"
    " n / (2 n - 1) of 2 n vectors: 0 where the modalities are apart, 1 where they are one cloud",
    "vectors": "as many of ECG as of text, those of the larger set drawn with a seed; the same for both models",
    "picture": "UMAP, fitted to ECG and text of a model and space together. No number is taken from it: its distances between clusters mean nothing",
}

Pair = tuple[np.ndarray, np.ndarray]  # vectors of ECG and of text, float64 [n, d] and [m, d]
Sample = tuple[np.ndarray, dict, int]  # codes uint16 [n_ecgs, 313], json, place in the split


def centroid_distance(ecg: np.ndarray, text: np.ndarray) -> tuple[float, float]:
    """(distance, cosine) of the centroids of [n, d] and [m, d], as CONVENTIONS say; nan where one is undefined: a centroid, or all, at 0."""
    one, two = ecg.mean(0), text.mean(0)
    norm = np.linalg.norm(np.concatenate([ecg, text]), axis=1).mean()
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(np.linalg.norm(one - two) / norm), float(one @ two / (np.linalg.norm(one) * np.linalg.norm(two)))


def mixing(ecg: np.ndarray, text: np.ndarray, k: int = K) -> float:
    """Of [n, d] each the share of other neighbours over chance, as CONVENTIONS say: 0 to (2 n - 1) / n. Raises ValueError if n differs or is not above k."""
    n = len(ecg)
    if len(text) != n or n <= k:
        raise ValueError(f"{n} and {len(text)} vectors: as many of both are needed, and more than {k}")
    vectors = np.concatenate([ecg, text])
    vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.finfo(float).tiny)
    near = vectors @ vectors.T
    np.fill_diagonal(near, -np.inf)  # nobody's own neighbour
    nearest = np.argpartition(-near, k - 1, axis=1)[:, :k]
    other = (nearest >= n) != (np.arange(2 * n)[:, None] >= n)
    return float(other.mean() * (2 * n - 1) / n)


def gap(ecg: np.ndarray, text: np.ndarray) -> dict:
    """The numbers of one model and space, None where undefined, from as many vectors of both, [n, d]."""
    distance, cosine = centroid_distance(ecg, text)
    said = {"centroid_distance": distance, "centroid_cosine": cosine, "mixing": mixing(ecg, text)}
    return {"n": len(ecg), **{name: value if np.isfinite(value) else None for name, value in said.items()}}


def balanced(ecg: np.ndarray, text: np.ndarray) -> Pair:
    """As many rows of both, those of the larger drawn with SEED."""
    n = min(len(ecg), len(text))
    return tuple(part[np.sort(np.random.default_rng(SEED).choice(len(part), n, replace=False))] for part in (ecg, text))


@dataclass(frozen=True)
class Model:
    """What reads samples: a causal LM with its tokenizer, ECG vocabulary and the prompts that it was tuned to."""

    lm: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    vocabulary: ECGVocabulary
    prompts: Prompts
    special: torch.Tensor  # ids of the tokenizer's own special tokens

    def is_text(self, ids: torch.Tensor) -> torch.Tensor:
        """Which token ids are text: no ECG tokens, which come after all text, and no special ones."""
        return (ids < self.vocabulary.start) & ~torch.isin(ids, self.special)


def load(folder: Path, flag: str, index: dict, device: str) -> Model:
    """Raises UserError naming the flag for a folder that is no such model, or that reads continuous ECGs, which have no rows in the embedding."""
    try:
        lm, tokenizer, vocabulary, prompts, adapter = load_trained(folder, index, torch.float32)
    except UserError as error:
        raise UserError(str(error).replace("--model", flag)) from error
    if adapter:
        raise UserError(f"{flag}: {folder} was tuned with --ecg_input continuous, so its embedding has no ECG tokens; name a model that reads tokens")
    return Model(lm.to(device), tokenizer, vocabulary, prompts, torch.tensor(tokenizer.all_special_ids))


def spaces_of(model: Model, samples: list[Sample], prompts: Prompts) -> dict[str, Pair]:
    """SPACES name -> vectors of ECG and of text, as many of both."""
    found = {"input": input_rows(model, samples, prompts), "last hidden state": hidden_means(model, samples, prompts)}
    return {name: balanced(*pair) for name, pair in found.items()}


@torch.no_grad()
def input_rows(model: Model, samples: list[Sample], prompts: Prompts) -> Pair:
    """What the codes, and the text tokens of all tasks, of the samples are embedded as: each token once, in order of their ids."""
    known = model.tokenizer, model.vocabulary, prompts
    read = [codes.astype(np.int64).reshape(-1) + model.vocabulary.first for codes, _, _ in samples]
    said = [prompt_ids(*known, codes, meta, task) for codes, meta, _ in samples for task in meta["tasks"]]
    said += [answer_ids(model.tokenizer, prompts, task) for _, meta, _ in samples for task in meta["tasks"]]
    ecg, text = (torch.from_numpy(np.unique(np.concatenate(ids))) for ids in (read, said))
    embed = model.lm.get_input_embeddings()  # the module, not its weight: some scale what they look up
    return tuple(embed(ids.to(model.lm.device)).double().cpu().numpy() for ids in (ecg, text[model.is_text(text)]))


@torch.no_grad()
def hidden_means(model: Model, samples: list[Sample], prompts: Prompts) -> Pair:
    """Of each sample the mean of the decoder's last state (after its last norm) over its ECG tokens, and over the text of a question or report."""
    known = model.tokenizer, model.vocabulary, prompts
    means = []
    for codes, meta, place in samples:
        task = one_task(meta["tasks"], place)
        shared, asked = shared_ids(*known, codes, meta), prompt_ids(*known, codes, meta, task)
        if task["task"] == "report":  # all reports are asked for in the same words
            asked = np.concatenate([asked, answer_ids(model.tokenizer, prompts, task)])
        ids = torch.from_numpy(np.concatenate([shared, asked]))
        hidden = model.lm.get_decoder()(input_ids=ids[None].to(model.lm.device), use_cache=False).last_hidden_state[0].double().cpu()
        rows = model.vocabulary.code_rows
        is_code = (ids >= rows.start) & (ids < rows.stop)
        is_text = model.is_text(ids) & (torch.arange(len(ids)) >= len(shared))
        means.append((hidden[is_code].mean(0).numpy(), hidden[is_text].mean(0).numpy()))
    return tuple(map(np.stack, zip(*means)))


def one_task(tasks: list[dict], place: int) -> dict:
    """One of a sample's questions, or reports if it has no question, drawn by the sample's place in the split."""
    asked = [task for task in tasks if task["task"] == "ecgqa"] or tasks
    return asked[np.random.default_rng([SEED, place]).integers(len(asked))]


def draw(path: Path, found: dict[str, dict[str, Pair]], numbers: dict[str, dict[str, dict]], umap) -> None:
    """A panel for each space (rows) and model (columns) of found[model][space], with its numbers[model][space]."""
    figure = Figure(figsize=(10, 10), layout="constrained")
    for row, space in zip(figure.subplots(len(SPACES), len(found)), SPACES):
        for axes, (model, spaces) in zip(row, found.items()):
            ecg, text = spaces[space]
            # one thread: with more the layout is another one each time
            fit = umap.UMAP(n_neighbors=NEIGHBOURS, metric="cosine", random_state=SEED, n_jobs=1)
            places = fit.fit_transform(np.concatenate([ecg, text]).astype(np.float32))
            for part, name, colour in ((places[: len(ecg)], "ECG", COLOURS[0]), (places[len(ecg) :], "text", COLOURS[1])):
                axes.scatter(*part.T, s=8, color=colour, alpha=0.6, linewidths=0, label=name)
            axes.set_title(f"{space}, {model} training\n{in_words(numbers[model][space])}", fontsize=10)
            axes.set(xticks=[], yticks=[])
            axes.legend(fontsize=8, loc="best")
    figure.supxlabel("UMAP of each panel alone: who is near whom. Distances in it mean nothing; the numbers are of the model's own space.", fontsize=8)
    with whole_file(path) as file:
        FigureCanvasAgg(figure).print_png(file)


def in_words(said: dict) -> str:
    shown = {"distance": "centroid_distance", "cosine": "centroid_cosine", "mixing": "mixing"}
    return ", ".join(f"{word} {'undefined' if said[name] is None else format(said[name], '.3f')}" for word, name in shown.items())


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m toolkit.evaluation.modality_gap", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", required=True, type=Path, help="the model before training: a folder of launchers/pretrain.py, instruct.py or merge")
    parser.add_argument("--after", required=True, type=Path, help="the model after training: the same")
    parser.add_argument("--shards", required=True, help="task shards written by `python -m sharding.shard_tasks`: a folder, or the URL of one")
    parser.add_argument("--split", choices=SPLITS, default="test", help="whose samples are read (default: %(default)s)")
    parser.add_argument("--out", required=True, type=Path, help="folder for gap.json and gap.png")
    parser.add_argument("--samples", type=int, default=200, help="at most this many samples, above 10, evenly spaced over the split (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.samples <= K:
        raise UserError(f"--samples {args.samples}: has to be above {K}, the neighbours that are looked at")
    return args


@exit_2_on_user_error
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    try:
        import umap
    except ImportError as error:
        raise UserError("--out: the picture needs umap-learn, which is not installed: pip install umap-learn") from error
    shards = Shards.open(args.shards, args.split, kind="tasks")
    if len(shards) <= K:
        raise UserError(f"--split {args.split}: its {len(shards)} samples are too few, more than {K} are needed; name another split")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {args.out} cannot be written: {error.strerror}") from error
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # transformers 5.23 of peft 0.21
    samples = [(shards.ids(i), shards.meta(i), i) for i in spaced(len(shards), args.samples)]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    before, after = (load(folder, flag, shards.index, device) for folder, flag in ((args.before, "--before"), (args.after, "--after")))
    try:
        after.prompts.check(before.tokenizer, before.vocabulary)
    except UserError as error:
        raise UserError(f"--before: {args.before} cannot be asked as --after was tuned to ({error}); name the model that --after was trained from") from error
    found = {name: spaces_of(model, samples, after.prompts) for name, model in (("before", before), ("after", after))}
    if few := next((space for spaces in found.values() for space, (ecg, _) in spaces.items() if len(ecg) <= K), None):
        raise UserError(f"--samples {args.samples}: {few} has too few ECG codes or text tokens there, more than {K} of each are needed; take more samples")
    numbers = {name: {space: gap(*pair) for space, pair in spaces.items()} for name, spaces in found.items()}
    draw(args.out / "gap.png", found, numbers, umap)
    about = {"before": str(args.before), "after": str(args.after), "shards": str(args.shards), "split": args.split, "samples": len(samples)}
    write_text(args.out / "gap.json", json.dumps({**numbers, "conventions": CONVENTIONS, "run": {**about, "k": K, "seed": SEED}}, indent=2) + "\n")
    for space in SPACES:
        for name in numbers:
            print(f"{space:>17}, {name + ' training':<15}: {in_words(numbers[name][space])}   ({numbers[name][space]['n']} of ECG and of text)")
    print(f"{args.out / 'gap.png'}, {args.out / 'gap.json'}. Research software; not for diagnosis.")


if __name__ == "__main__":
    main()
