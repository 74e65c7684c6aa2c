"""What the trainers train: a causal LM over packed rows, whose forward is the summed loss."""

from types import MethodType

import torch
from peft import PeftModel
from peft.utils.other import AuxiliaryTrainingWrapper
from torch.nn import functional as F
from transformers import PreTrainedModel

from toolkit.errors import UserError
from toolkit.lm import attention
from toolkit.lm.continuous import ECGAdapter, embedded
from toolkit.lm.kernels import LOSSES
from toolkit.shards.packing import Packed

SCALED_LOGITS = ("final_logit_softcapping", "logits_scaling", "logit_scale")  # of Gemma 2, Granite, Cohere; outside the head's own forward


class PackedLM(torch.nn.Module):
    """`lm` (a Hugging Face causal LM, or a PEFT model of one) with `heartspeed_packed` attention. Save `.lm`, not this.

    kernels: `liger` or `eager`, what `kernels.apply` returned. head_rows: the loss and the logits are over these rows of the vocabulary alone.
    adapter: what makes embeddings of a row's `features`, trained beside `lm`; without one ECG tokens have rows of the embedding as all others.
    Raises UserError for a backbone whose logits are not its head's weight times the hidden state.
    """

    def __init__(self, lm: PreTrainedModel | PeftModel, kernels: str = "eager", head_rows: range | None = None, adapter: ECGAdapter | None = None):
        super().__init__()
        self.lm, self.head_rows, self.loss, self.adapter = lm, head_rows, LOSSES[kernels], adapter
        attention.use_packed_attention(lm)
        head = self._base().get_output_embeddings()
        what = next((name for name in SCALED_LOGITS if getattr(lm.config, name, None) not in (None, 1, 1.0)), None)
        if not isinstance(head, (torch.nn.Linear, AuxiliaryTrainingWrapper)):
            what = f"a head of {type(head).__name__}"
        elif getattr(head, "bias", None) is not None:
            what = "a head with a bias"
        if what:
            raise UserError(f"--backbone: {type(self._base()).__name__} has {what}, which the loss does not know; use another")
        head.forward = MethodType(_head_forward, head)

    def forward(self, row: Packed, logits: bool = False) -> torch.Tensor:
        """Sum (not mean) of the cross-entropy over the row's targets, a float32 scalar; with `logits` the logits [len(row.targets), vocabulary].

        Raises ValueError if a target is not among `head_rows`.
        """
        rows, targets = self.head_rows, row.targets
        if rows is not None:
            targets = targets - rows.start
            if len(targets) and not 0 <= targets.min() <= targets.max() < len(rows):
                raise ValueError(f"a target is outside of the head's rows {rows.start} to {rows.stop - 1}")
        base, device = self._base(), next(self.parameters()).device
        place = lambda array: torch.from_numpy(array).to(device)
        ids = place(row.input_ids)[None]
        hidden = base.get_decoder()(
            **({"input_ids": ids} if self.adapter is None else {"inputs_embeds": embedded(base, self.adapter, ids, row.features)}),
            position_ids=place(row.position_ids)[None],
            layout=attention.Layout.of(row.layout, device),
            use_cache=False,  # with a cache transformers builds masks of its own, that see across documents
        ).last_hidden_state[0]
        head, hidden = base.get_output_embeddings(), hidden[place(row.predict_at)]
        return head(hidden, rows=rows) if logits else head(hidden, rows=rows, targets=place(targets), loss=self.loss)

    def _base(self) -> PreTrainedModel:
        return self.lm.get_base_model() if isinstance(self.lm, PeftModel) else self.lm


def _head_forward(self, hidden, targets=None, loss=None, rows: range | None = None):
    """The head's logits, as before; with `targets` the loss. It is computed in here because under ZeRO-3 the weight is there only in the head's call.

    `self.weight` of a head in one of PEFT's wrappers is the weight with what was trained.
    """
    if targets is None and rows is None:
        return type(self).forward(self, hidden)
    weight = self.weight if rows is None else self.weight[rows.start : rows.stop]
    return F.linear(hidden, weight) if targets is None else loss(hidden, weight, targets)
