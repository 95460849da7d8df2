"""Which experts are probably in the memory of each worker's device, where it does not hold all of them.

No engine says which experts its device holds: vLLM 0.32 and SGLang have no such metric. But they follow from what the
worker does. A device that copies missing experts drops those that it has not used for long. So it probably holds the
experts that its steps activate most, lately: a moving average of the probabilities, moved whenever a request starts or
ends there. A device whose host computes the missing experts holds the same ones for good, which were chosen by traffic
like that of the whole fleet.

An expert that is missing costs more reads than one. With these prices, the experts of steps become reads.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from eldr import kernels
from eldr.errors import EldrError
from eldr.policies.rows import longer, row_products
from eldr.policies.unions import Geometry

# The reads of one missing expert: the bandwidth of a device's memory, 3.35 TB/s of an H100 (NVIDIA's data sheet), over
# that of what brings the expert. In one direction PCIe 5.0 x16 has 63 GB/s and PCIe 4.0 x16 has 31.5 (PCI-SIG), and
# copies reach 55 and 27 of them. A host with eight channels of DDR5-4800 has 307 GB/s, and its kernels reach some 240.
MISS_COSTS: Final = {"pcie5": 60.0, "pcie4": 120.0, "cpu": 14.0}
COMPUTED_BY_HOST: Final = "cpu"
# The share of an average that one start or end replaces.
MOVED: Final = 0.2


class HostShare:
    """How much of each layer the devices hold, and what the rest costs.

    resident: the share of the experts of each layer that a device holds, above 0 and below 1.
    miss_cost: one of MISS_COSTS, or the reads that a transfer takes.
    """

    def __init__(self, resident: float, miss_cost: str) -> None:
        self.resident = resident
        self.ratio = miss_ratio(miss_cost)
        self.computed = miss_cost == COMPUTED_BY_HOST

    def capacity(self, experts: int) -> int:
        """The experts of a layer that a device holds, of so many: at least one."""
        return max(1, round(self.resident * experts))

    @property
    def missing_reads(self) -> float:
        """What a step waits for because of one missing expert. If it was copied, the device still reads it."""
        return self.ratio if self.computed else 1.0 + self.ratio


def miss_ratio(miss_cost: str) -> float:
    """The reads that a missing expert takes to be copied or computed. Raises EldrError for what is no miss cost."""
    known = MISS_COSTS.get(miss_cost)
    if known is not None:
        return known
    try:
        ratio = float(miss_cost)
    except ValueError:
        ratio = -1.0
    if not 0 <= ratio < float("inf"):
        raise EldrError(
            f"miss_cost is {miss_cost!r}, expected {', '.join(MISS_COSTS)}, or the time of a transfer divided by that "
            "of reading the expert on the device"
        )
    return ratio


class Residents:
    """The experts that each worker's device holds, and the reads that its steps wait for, one row per worker.

    Matrices have spare rows, and the first W are in use.

    reads: float64 [W], the expected reads of a step, summed over layers.
    """

    def __init__(self, geometry: Geometry, host: HostShare) -> None:
        self.reads = np.zeros(0)
        self._layers = geometry.layers
        self._experts = geometry.experts
        self._follows = not host.computed
        self._prices = (np.float32(1), np.float32(host.missing_reads))
        self._dropped = geometry.experts - host.capacity(geometry.experts)
        self._use = np.zeros((0, geometry.dimension), dtype=np.float32)
        self._priced = np.zeros((0, geometry.dimension), dtype=np.float32)

    @property
    def all_reads(self) -> float:
        """The reads of a step that activates all experts."""
        resident, missing = self._prices
        held = self._experts - self._dropped
        return self._layers * (held * float(resident) + self._dropped * float(missing))

    def append(self) -> None:
        """Add a row for one more worker."""
        row = len(self.reads)
        if row == len(self._use):
            self._use, self._priced = longer(self._use), longer(self._priced)
        self._use[row] = 0
        self._priced[row] = self._prices[0]
        self.reads = np.append(self.reads, 0.0)

    def remove(self, row: int) -> None:
        """Remove a worker's row. The last row takes its place."""
        last = len(self.reads) - 1
        for array in (self._use, self._priced, self.reads):
            array[row] = array[last]
        self.reads = self.reads[:-1]

    def changed(self, row: int, survival: NDArray[np.uint16], mean_profile: NDArray[np.float32]) -> None:
        """Other requests run on a worker now.

        survival: uint16 [D], the probabilities that none of them activates an expert (`Unions.survival`).
        mean_profile: float32 [D], the mean profile of the fleet's requests.
        """
        idle = kernels.from_fractions(survival)
        use = mean_profile
        if self._follows:
            use = self._use[row]
            use += np.float32(MOVED) * (1 - idle - use)
        of_layers = use.reshape(self._layers, self._experts)
        least_held = np.partition(of_layers, self._dropped, axis=1)[:, self._dropped, None]
        price = np.where(of_layers >= least_held, *self._prices).reshape(-1)
        np.multiply(idle, price, out=self._priced[row])
        self.reads[row] = float(price.sum()) - float(self._priced[row].sum())

    def added(self, profile: NDArray[np.float32]) -> NDArray[np.float64]:
        """The reads that a request would add to each worker's steps, float64 [W]."""
        return row_products(self._priced[: len(self.reads)], profile)
