"""ECGs without discretisation (`--ecg_input continuous`): a linear layer makes embeddings of the ECG encoder's features, in the places of the code tokens."""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from toolkit.errors import UserError, first_line
from toolkit.lm.gathered import gathered

FILE = "ecg_adapter.safetensors"
RIDGE = 1e-3  # of the mean square of the features


class ECGAdapter(torch.nn.Linear):
    """Features [k, D], standardised by `mean` and `std` (float32 [D], not trained), -> embeddings [k, hidden] of the tokens in `rows` of the vocabulary.

    They are (W features + b) / sqrt(D): so a step of AdamW moves an embedding about as far as a step on a row of the embedding would. On `tiny` the SD of the
    embeddings went from 0.021 to 0.047 in 20 steps, without the root to 0.40; the validation loss after 80 steps was 3.49, without 3.82, over D 4.06.
    """

    def __init__(self, mean: np.ndarray, std: np.ndarray, hidden: int, rows: range):
        super().__init__(len(mean), hidden)
        self.mean, self.std, self.rows = mean, std, rows  # no buffers: in a bf16 engine those would be rounded

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return super().forward(features) * self.in_features**-0.5

    def save(self, folder: Path, state: dict[str, torch.Tensor]) -> None:
        """Write the adapter. state: its `weight` and `bias`, whole."""
        statistics = {name: torch.from_numpy(np.asarray(getattr(self, name), np.float32)) for name in ("mean", "std")}
        save_file({**{name: state[name].contiguous() for name in ("weight", "bias")}, **statistics}, folder / FILE)

    @classmethod
    def load(cls, folder: Path, rows: range, flag: str) -> "ECGAdapter":
        """Raises UserError naming the flag if it is not there or damaged."""
        try:
            held = load_file(folder / FILE)
            adapter = cls(held.pop("mean").numpy(), held.pop("std").numpy(), len(held["bias"]), rows)
            adapter.load_state_dict(held)
        except Exception as error:  # safetensors, torch and the disk each fail in their own ways
            raise UserError(f"{flag}: {folder / FILE} is missing or damaged ({first_line(error)}); copy the folder again") from error
        return adapter.eval()


def fitted(model: PreTrainedModel, rows: range, mean: np.ndarray, std: np.ndarray, features: np.ndarray, codes: np.ndarray) -> ECGAdapter:
    """The adapter that training starts from: of all linear ones that which comes nearest (least squares) to the embedding rows of the codes.

    features: float32 [n, D], standardised; codes: int [n]. So a model that knows the tokens reads its first ECG nearly as before: 68 % of the
    rows' variance is in it (`tiny`, PTB-XL). Collective where the embedding is born sharded (ZeRO-3).
    """
    weight = model.get_input_embeddings().weight
    with gathered([weight]), torch.no_grad():  # the module, not its weight: some scale what they look up
        table = model.get_input_embeddings()(torch.arange(rows.start, rows.stop, device=weight.device)).double().cpu()
    x = torch.from_numpy(np.concatenate([features, np.ones((len(features), 1))], 1)).double()
    y = table[torch.from_numpy(codes.astype(np.int64))]
    ridge = RIDGE * len(x) * torch.eye(x.shape[1], dtype=torch.float64)
    ridge[-1, -1] = 0  # the mean is free
    solution = torch.linalg.solve(x.T @ x + ridge, x.T @ y)
    adapter = ECGAdapter(mean, std, table.shape[1], rows)
    with torch.no_grad():
        adapter.weight.copy_(solution[:-1].T * adapter.in_features**0.5)
        adapter.bias.copy_(solution[-1] * adapter.in_features**0.5)
    return adapter.to(weight.dtype)  # where it is born sharded the model is bf16 already, and DeepSpeed refuses two types


def embedded(model, adapter: ECGAdapter, ids: torch.Tensor, features: np.ndarray | None) -> torch.Tensor:
    """ids int64 [B, n] -> what a model takes as `inputs_embeds` [B, n, hidden]; features [k, D]: one row for each id in `adapter.rows`, in order.

    Raises ValueError for another number of features.
    """
    table = model.get_input_embeddings()(ids)
    at = (ids >= adapter.rows.start) & (ids < adapter.rows.stop)
    features = np.zeros((0, adapter.in_features), np.float16) if features is None else features  # text alone: all weights get a gradient nevertheless
    if int(at.sum()) != len(features):
        raise ValueError(f"{len(features)} features for {int(at.sum())} ECG tokens")
    made = adapter(torch.from_numpy(features).to(ids.device, adapter.weight.dtype)).to(table.dtype)
    return table.masked_scatter(at[..., None], made)
