"""Errors users meet: each message is one sentence that names the field and the remedy."""

from __future__ import annotations


class PlanError(ValueError):
    """A plan (or a file that should hold one) is wrong."""


class ModelError(ValueError):
    """A model cannot be served as asked, or does not match the plan."""


class CacheError(RuntimeError):
    """A cache operation is impossible in the cache's present state."""


class DataError(ValueError):
    """A text, token or result file is missing, cut short or of the wrong kind."""


class MissingExtraError(ImportError):
    """An optional package is absent; the message names the extra that installs it."""


class KernelError(RuntimeError):
    """A faster backend cannot be used here; the message says what it lacks."""


class ServerError(RuntimeError):
    """A server is away, or does not answer as asked."""


EXPECTED = (CacheError, DataError, KernelError, MissingExtraError, ModelError, PlanError, ServerError, OSError)
"""What can happen to anybody: commands show the message alone."""
