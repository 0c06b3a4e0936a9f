"""Whose code decides what a plan's cache holds."""

from __future__ import annotations

from kvloom import codecs
from kvloom.codecs import Codec
from kvloom.eviction import Policy
from kvloom.plan import Plan


def made_by(plan: Plan) -> list[Codec | Policy]:
    """The plan's codecs and eviction policies."""
    rooms = (plan.room(layer) for layer in plan.model.packed_layers)
    return [*map(codecs.get, plan.codecs), *(room.policy for room in rooms if room)]
