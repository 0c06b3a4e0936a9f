"""Doors to other projects; each one needs its extra, and is imported by name."""
