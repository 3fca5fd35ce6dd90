"""Moves small tensors between host and device without either waiting for the other.

A plain copy to ordinary memory, or from it, waits until the device has done all that was asked of it before, so that
nothing more can be asked meanwhile. Knows tensors and devices. Knows nothing of what they mean.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Return ``values``, which lie on the host, on ``device``."""
    if device.type == "cuda":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


class Arriving:
    """Tensors on their way to the host, as they are once all that was asked of the device so far is done."""

    def __init__(self, values: Sequence[Tensor]) -> None:
        # Waited for asleep: the core is the HTTP side's meanwhile, and the next step is on its way already.
        self._event: torch.cuda.Event | None = None
        if not values or not values[0].is_cuda:
            # The tensors may be written again before they are waited for.
            self._values = [value.clone() for value in values]
            return
        self._values = [torch.empty_like(value, device="cpu", pin_memory=True) for value in values]
        for landing, value in zip(self._values, values, strict=True):
            landing.copy_(value, non_blocking=True)
        self._event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self._event.record()

    def wait(self) -> list[Tensor]:
        """The tensors on the host. Waits for no later work."""
        if self._event is not None:
            self._event.synchronize()
        return self._values
