"""Workers whose memory holds only some of the experts of each layer. The others are in the host's memory.

There are two ways to serve an expert that is missing:

- *Transfers.* The expert is copied to the device and takes the place of another, so a part of the device's memory is a
  cache (MoE-Infinity, arXiv 2401.14361; FineMoE, arXiv 2502.05370; `--moe-expert-cache-size` in vLLM's pull request
  37190; `--moe-expert-cache` in llama.cpp's 27861). A step then waits for one read of each of its experts, and for the
  transfers, which share one link: distinct + ratio x missing. The ratio is the bandwidth of the device's memory divided
  by that of the link.
- *The CPU.* The host computes the missing experts where they are, and nothing is copied (Fiddler, arXiv 2402.07033;
  KTransformers with `--kt-num-gpu-experts`). Which experts the device holds was decided before, by how often they are
  used. Both work at the same time, so a layer waits for the slower: max(resident, ratio x missing). The ratio is the
  bandwidth of the device's memory divided by that of the host's.

Left out are transfers that begin before the experts of a layer are known (prefetching), and the arithmetic of the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eldr import kernels
from eldr.policies.residents import HostShare
from eldr.replay.reading import Reading, unpacked

# Uses are halved after so many steps, so that what was popular long ago is forgotten (TinyLFU, arXiv 1512.00727).
HALVE_EVERY = 1024


@dataclass(frozen=True, slots=True)
class HostLayout:
    """How workers divide the experts between device and host.

    host: how much of each layer their devices hold, and what the rest costs.
    by_frequency: whether a device drops what was used least often (LFU), and not what was used least recently (LRU).
    """

    host: HostShare
    by_frequency: bool = False


@dataclass(frozen=True, slots=True)
class CacheShape:
    """A cache of experts.

    layers, experts: L layers of E experts.
    capacity: the experts of each layer that it holds, 1 to E.
    by_frequency: whether it drops what was used least often (LFU), and not what was used least recently (LRU).
    """

    layers: int
    experts: int
    capacity: int
    by_frequency: bool = False


class HostMemory(Reading):
    """A device that keeps a cache of experts, with transfers of those that are missing.

    All active experts of a step are needed at once, so the resident ones among them are hits, and no expert makes room
    for another of the same step while there is one that the step does not use. If a step uses more experts than fit,
    those that are missing pass through: the last ones remain, in order of priority and then of their number. The cache
    begins with the first experts of each layer. Of equal priorities, the expert of the lowest number goes first.

    ratio: the time of a transfer, in reads.
    """

    def __init__(self, shape: CacheShape, ratio: float) -> None:
        self._shape = shape
        self._ratio = ratio
        self._halve_every = HALVE_EVERY if shape.by_frequency else 0
        self._step = 1
        self._priority = np.zeros((shape.layers, shape.experts), dtype=np.uint64)
        self._resident = np.zeros((shape.layers, shape.experts), dtype=np.uint8)
        self._resident[:, : shape.capacity] = 1

    @property
    def resident(self) -> NDArray[np.bool_]:
        """Which experts the device holds, bool [L, E]."""
        return np.asarray(self._resident == 1)

    def of_batch(self, active: NDArray[np.uint64]) -> NDArray[np.float64]:
        missing = self._missing(active, self._priority.copy(), self._resident.copy())
        return np.asarray(np.bitwise_count(active).sum(axis=1, dtype=np.float64) + self._ratio * missing)

    def of_expected(self, active: NDArray[np.float64]) -> NDArray[np.float64]:
        """What is expected of the experts that are resident now. What these steps bring does not count."""
        return np.asarray(active @ np.where(self._resident.reshape(-1), 1.0, 1.0 + self._ratio))

    def made(self, active: NDArray[np.uint64]) -> None:
        self._missing(active, self._priority, self._resident)
        self._step += len(active)

    def _missing(
        self, active: NDArray[np.uint64], priority: NDArray[np.uint64], resident: NDArray[np.uint8]
    ) -> NDArray[np.int64]:
        """Let these arrays make the steps. Returns the missing experts of each, int64 [S]."""
        missing = np.empty(len(active), dtype=np.int64)
        kernels.cache_experts(
            np.ascontiguousarray(active),
            self._shape.layers,
            self._shape.experts,
            self._step,
            self._halve_every,
            priority,
            resident,
            missing,
        )
        return missing


class HostComputed(Reading):
    """A device that holds the same experts for good, beside a CPU that computes the others.

    resident: bool [L, E], the experts that the device holds.
    ratio: the time that the CPU takes for one expert, in reads.
    """

    def __init__(self, resident: NDArray[np.bool_], ratio: float) -> None:
        self._shape = resident.shape
        self._resident = resident.astype(np.float64)
        self._ratio = ratio

    def of_batch(self, active: NDArray[np.uint64]) -> NDArray[np.float64]:
        return self.of_expected(unpacked(active, self._resident.size).astype(np.float64))

    def of_expected(self, active: NDArray[np.float64]) -> NDArray[np.float64]:
        by_layer = active.reshape(len(active), *self._shape)
        device = (by_layer * self._resident).sum(axis=-1)
        host = by_layer.sum(axis=-1) - device
        return np.asarray(np.maximum(device, self._ratio * host).sum(axis=-1))


def most_used(uses: NDArray[np.floating], capacity: int) -> NDArray[np.bool_]:
    """The `capacity` experts of each layer with the most uses, bool [L, E]. uses: [L, E]."""
    resident = np.zeros(uses.shape, dtype=np.bool_)
    order = np.argsort(-uses, axis=1, kind="stable")[:, :capacity]
    np.put_along_axis(resident, order, values=True, axis=1)
    return resident
