"""Memory over context as a task: arithmetic, without data."""

from __future__ import annotations

from kvloom._ledger import Record
from kvloom.evaluate._memory import memory
from kvloom.evaluate.tasks._base import Bench, Task, register


class Memory(Task):
    """Bytes of every plan from 1K to 1M tokens."""

    name = "memory"

    def run(self, bench: Bench) -> list[Record]:
        """See `memory`."""
        return memory(bench.model, bench.contestants, name=bench.name, out=bench.out)


register(Memory.name, lambda _: [Memory()])
