"""Several rewritings of the graph of a compiled step, where torch's compiler has a place for one."""

from __future__ import annotations

from typing import Any

from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph


class Passes(CustomGraphPass):
    """One pass after another.

    Args:
        *passes: In this order.
    """

    def __init__(self, *passes: CustomGraphPass) -> None:
        self._passes = passes

    def __call__(self, graph: Graph) -> None:
        """Rewrite a graph."""
        for each in self._passes:
            each(graph)

    def uuid(self) -> Any:
        """Of all rewritings, for the compiler's cache."""
        return tuple(each.uuid() for each in self._passes)
