"""What a conversion says otherwise than its source: stated always, substituted only when allowed."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvloom.errors import PlanError


@dataclass
class Deviations:
    """Collects sentences on what the other side does otherwise.

    Attributes:
        substitute: Whether a number format or a window may be replaced by the nearest there is.
        notes: One sentence for each deviation, in the order met.
    """

    substitute: bool = False
    notes: list[str] = field(default_factory=list)

    def note(self, sentence: str) -> None:
        """State what holds on one side only and needs nobody's consent; the same sentence once."""
        if sentence not in self.notes:
            self.notes.append(sentence)

    def instead(self, asked: str, given: str) -> None:
        """Take ``given`` where the source says ``asked``.

        Raises:
            PlanError: Substitutes are not allowed.
        """
        if not self.substitute:
            raise PlanError(f"{asked}; pass substitute=True (kvloom convert --substitute) to take {given} instead.")
        self.note(f"{asked}: {given} instead")
