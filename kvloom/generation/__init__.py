"""Decoding at the device's speed: one replayed graph a token, and nobody waits for the host."""

from kvloom.generation._loop import decode_loop, serves

__all__ = ["decode_loop", "serves"]
