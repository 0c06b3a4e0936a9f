"""Rounding to fp16, in which scales and zero points are stored."""

from __future__ import annotations

import torch

FP16_MAX = torch.finfo(torch.float16).max


def half_near(x: torch.Tensor) -> torch.Tensor:
    """Nearest fp16 number, at most 65504 in magnitude."""
    return x.clamp(-FP16_MAX, FP16_MAX).half()


def half_down(x: torch.Tensor) -> torch.Tensor:
    """Largest fp16 number not above ``x`` (|x| <= 65504)."""
    near = x.half()
    return torch.where(near.to(x.dtype) > x, torch.nextafter(near, near.new_full((), -FP16_MAX)), near)


def half_up(x: torch.Tensor) -> torch.Tensor:
    """Smallest fp16 number not below ``x``, at most 65504."""
    near = x.clamp(max=FP16_MAX).half()
    return torch.where(near.to(x.dtype) < x, torch.nextafter(near, near.new_full((), FP16_MAX)), near)
