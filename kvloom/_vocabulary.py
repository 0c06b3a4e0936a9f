"""Token ids that a model can read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvloom.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


def check_vocabulary(model: PreTrainedModel, tokens: Tensor) -> None:
    """Refuse token ids that a CPU finds only when it looks them up, and a GPU not before all its work is lost.

    Raises:
        DataError: an id is not in the model's vocabulary.
    """
    size: int = model.config.get_text_config(decoder=True).vocab_size
    if bool(((tokens < 0) | (tokens >= size)).any()):
        raise DataError(
            f"token ids go from {int(tokens.min())} to {int(tokens.max())}, and the model's vocabulary has {size} "
            f"(0 to {size - 1}): use the model's own tokenizer."
        )
