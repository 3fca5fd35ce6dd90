"""Mends Triton's interpreter, which cuts float32 off to bfloat16 where a GPU rounds to nearest even, takes whole
numbers for bfloat16's bits, and multiplies bfloat16 matrices by their bit patterns."""

import os
from typing import Any

import numpy as np
import pytest


@pytest.fixture(autouse=True)
def _mended_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    true_cast = InterpreterBuilder.cast_impl

    def cast(self: Any, source: Any, kind: Any) -> Any:
        known = source.dtype.scalar == tl.float32 or source.dtype.scalar.is_int()
        if not known or kind.scalar != tl.bfloat16:
            return true_cast(self, source, kind)
        bits = np.ascontiguousarray(source.data.astype(np.float32)).view(np.uint32)
        rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        kept = np.where(np.isnan(source.data), bits >> 16 | 0x40, rounded).astype(np.uint16)
        return TensorHandle(kept, kind.scalar)

    def widened(factor: Any) -> Any:
        if factor.dtype.scalar != tl.bfloat16:
            return factor.data
        return (factor.data.astype(np.uint32) << 16).view(np.float32)

    def dot(self: Any, left: Any, right: Any, added: Any, *_precision: Any) -> Any:
        product = np.matmul(widened(left), widened(right), dtype=added.data.dtype)
        return TensorHandle(product + added.data, added.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "cast_impl", cast)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)
