"""Decoding at the device's speed: one replayed graph a token, and nobody waits for the host."""

from kvloom.generation._loop import decode_loop, serves
from kvloom.generation._step import Step, step_of

__all__ = ["Step", "decode_loop", "serves", "step_of"]
