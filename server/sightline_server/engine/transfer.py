"""Hands small host tensors to the device without waiting for it.

A plain copy from ordinary memory waits until the device has done all that was asked of it before, so that nothing more
can be asked meanwhile. Knows tensors and devices. Knows nothing of what they mean.
"""

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Return ``values``, which lie on the host, on ``device``."""
    if device.type == "cuda":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)
