"""What replayed decode steps ask of a layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

NO_ASSISTANT = "a cache of fixed size cannot decode with an assistant: leave out max_tokens."


class StepLayer(ABC):
    """A layer of a cache of fixed size: its pass of one token can be the same launches every time.

    Attributes:
        is_graph_safe: Whether such a pass never waits for the device.
        is_graph_safe_between_pages: Whether it does not where no page is filled (`kvloom.kernels.between_pages`).
        store: What steps write to: another one once the layer has allocated anew.
    """

    is_graph_safe: bool
    is_graph_safe_between_pages: bool
    store: Any

    @property
    @abstractmethod
    def takes_steps(self) -> bool:
        """Whether a pass of one token would be appended by operators now."""

    @abstractmethod
    def changes_more(self, tokens: int) -> bool:
        """Whether the step that follows so many tokens does more than write to the ring: fill a page or a sink."""

    @abstractmethod
    def undoes_step(self, tokens: int) -> bool:
        """Whether `crop` takes a token back exactly that has followed so many."""
