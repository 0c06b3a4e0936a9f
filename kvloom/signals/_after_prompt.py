"""What keeping only some tokens of a prompt does to the tokens that follow it.

The prompt reads itself exactly, so that its keys and values are what they are whatever leaves. What changes is the
attention output of the tokens that follow: their weights over the kept tokens are those of a softmax that the others
take no part in. As with stored keys (`_replay`) the output is computed exactly and only what follows is linear: with
`G` the gradient of the sum of log p by the output `O`, a token changes that sum by `G . (O_kept - O)`. To second order
half the mean square of the change is the KL divergence (`_error_gradient`); neighbouring tokens miss the same ones, so
that their changes are added before they are squared, over all heads.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvloom.signals._error_gradient import QUERY_BLOCK
from kvloom.signals._tap import Scoring, grouped_matmul


@dataclass(frozen=True)
class Followed:
    """One layer's attention of the tokens that follow a prompt.

    Attributes:
        query: `[batch, kv_heads, group, new, head_dim]`.
        key: `[batch, kv_heads, prompt + new, head_dim]`.
        value: The same shape.
        scoring: What lies between scores and probabilities, with a mask.
        output: What attention gave, shaped like the query; part of the graph.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scoring: Scoring
    output: Tensor

    def squares(self, kept: Iterable[Tensor], gradients: Sequence[Tensor]) -> Tensor:
        """Sums of squared changes of the log likelihood through this layer, the mean over gradients.

        Args:
            kept: What each alternative keeps, bool `[batch, kv_heads, prompt]`; the tokens that follow are all kept.
            gradients: By the output, shaped like it.

        Returns:
            float32 `[alternatives, batch]`.
        """
        exact, found = self._read(None), []
        for each in kept:
            change = self._read(each) - exact
            by_token = torch.stack([(gradient.float() * change).sum(dim=(1, 2, 4)) for gradient in gradients])
            whole = pad(by_token, (0, -by_token.shape[-1] % QUERY_BLOCK))
            found.append(whole.unflatten(-1, (-1, QUERY_BLOCK)).sum(dim=-1).square().sum(dim=-1).mean(dim=0))
        return torch.stack(found)

    def _read(self, kept: Tensor | None) -> Tensor:
        """Attention output over the kept tokens (None: all), float32, shaped like the query."""
        scoring = self.scoring
        if kept is not None:
            visible = pad(kept, (0, self.key.shape[2] - kept.shape[2]), value=True)[:, :, None]
            scoring = replace(scoring, mask=visible if scoring.mask is None else visible & scoring.mask)
        return grouped_matmul(scoring.probabilities(self.query.float(), self.key.float(), 0), self.value.float())


@dataclass
class AfterPrompt:
    """Attention of the tokens that follow a prompt, kept with the graph of gradients by its output.

    Attributes:
        layers: Layers whose cache would be packed; the others attend as usual and are not kept.
        caught: What was caught, by layer.
    """

    layers: Collection[int]
    caught: dict[int, Followed] = field(default_factory=dict)

    def attend(self, layer: int | None, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """Attention output of a grouped query, shaped like it."""
        weights = scoring.probabilities(query, key, 0)
        output = grouped_matmul(weights.to(value.dtype), value)
        if layer is not None and layer in self.layers:
            if not output.requires_grad:
                output.requires_grad_()
            states = query.detach(), key.detach(), value.detach()
            self.caught[layer] = Followed(*states, scoring, output)
        return output
