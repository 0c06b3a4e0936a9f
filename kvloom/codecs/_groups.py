"""Elements by the group that shares their parameters."""

from __future__ import annotations

import torch

from kvloom.pages import Format


def group(x: torch.Tensor, fmt: Format) -> torch.Tensor:
    """Groups along the last axis: ``[..., tokens, head_dim]`` -> ``[..., a, b, group_size]``.

    ``per_channel``: a = token group, b = channel. ``per_token``: a = token, b = channel group.
    """
    *lead, tokens, channels = x.shape
    if fmt.grouping == "per_channel":
        return x.reshape(*lead, tokens // fmt.group_size, fmt.group_size, channels).transpose(-1, -2)
    return x.reshape(*lead, tokens, channels // fmt.group_size, fmt.group_size)


def ungroup(x: torch.Tensor, shape: torch.Size, fmt: Format) -> torch.Tensor:
    """Inverse of `group`."""
    if fmt.grouping == "per_channel":
        x = x.transpose(-1, -2)
    return x.reshape(shape)
