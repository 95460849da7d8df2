"""Copies a device tensor to the host without making the thread that launches kernels wait."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


class HostCopy:
    """A copy of `tensor` that starts at once. The code that reads it waits for it.

    Pickling reads the copy. If a worker has its own process, that happens in the thread that sends the step's output,
    which waits for the step anyway. `tensor` must not be written to afterwards.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self._arrived: Any = None
        if tensor.device.type == "cpu":
            self._host = tensor
            return
        self._host = torch.empty_like(tensor, device="cpu", pin_memory=True)
        self._host.copy_(tensor, non_blocking=True)
        self._arrived = torch.Event(tensor.device)
        self._arrived.record()

    def ready(self) -> bool:
        """Whether `numpy` would return at once."""
        return self._arrived is None or bool(self._arrived.query())

    def numpy(self) -> NDArray[Any]:
        if self._arrived is not None:
            self._arrived.synchronize()
        array: NDArray[Any] = self._host.numpy()
        return array

    def __reduce__(self) -> tuple[Any, ...]:
        return _from_array, (self.numpy(),)


def _from_array(array: NDArray[np.generic]) -> HostCopy:
    return HostCopy(torch.from_numpy(array))
