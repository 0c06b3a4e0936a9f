"""Key norms (Devoto et al., arXiv 2406.11430): keys of small L2 norm receive much attention, so they are kept.

No queries are needed. The newest tokens have no privilege, as in the paper: a window's ``recent`` gives them one. Norms
are those of the keys after their rotary embedding, which does not change them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvloom.eviction._base import Policy, register

if TYPE_CHECKING:
    import torch

    from kvloom.eviction._seen import Seen


class KeyNorm(Policy):
    """Tokens by the norms of their keys."""

    name = "key_norm"

    def scores(self, seen: Seen) -> torch.Tensor:
        """The smaller the norm, the better."""
        norms: torch.Tensor = seen.keys.float().norm(dim=-1)
        return -norms


register(KeyNorm)
