"""What the trainers train: a causal LM over packed rows, whose forward is the summed loss."""

import torch
from peft import PeftModel
from torch.nn import functional as F
from transformers import PreTrainedModel

from toolkit.lm import attention
from toolkit.shards.packing import Packed


class PackedLM(torch.nn.Module):
    """`lm` (a Hugging Face causal LM, or a PEFT model of one) with `heartspeed_packed` attention. Save `.lm`, not this."""

    def __init__(self, lm: PreTrainedModel | PeftModel):
        super().__init__()
        self.lm = lm
        attention.use_packed_attention(lm)

    def forward(self, row: Packed, logits: bool = False) -> torch.Tensor:
        """Sum (not mean) of the cross-entropy over the row's targets, a float32 scalar; with `logits` the logits [len(row.targets), vocabulary]."""
        base = self.lm.get_base_model() if isinstance(self.lm, PeftModel) else self.lm
        head = base.get_output_embeddings()
        place = lambda array: torch.from_numpy(array).to(head.weight.device)
        hidden = base.get_decoder()(
            input_ids=place(row.input_ids)[None],
            position_ids=place(row.position_ids)[None],
            layout=row.layout,
            use_cache=False,  # with a cache transformers builds masks of its own, that see across documents
        ).last_hidden_state[0]
        scores = head(hidden[place(row.predict_at)])
        return scores if logits else F.cross_entropy(scores.float(), place(row.targets), reduction="sum")
