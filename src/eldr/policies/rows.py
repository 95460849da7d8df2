"""Workers as the rows of arrays: the row of each worker, and matrices that grow by a row."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from eldr import kernels


class WorkerRows:
    """The row of each worker, 0 to W - 1. When a worker leaves, the last row takes its place.

    names: the W workers in the order of their rows.
    row_of: worker -> its row.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.row_of: dict[str, int] = {}
        self._all = np.arange(0)

    def rows(self, workers: list[str]) -> NDArray[np.int64]:
        """The rows of N workers, int64 [N]. Raises KeyError for a worker without a row."""
        return self._all if workers == self.names else np.array([self.row_of[worker] for worker in workers])

    def append(self, worker: str) -> None:
        """Give a worker that joins the next row."""
        self.row_of[worker] = len(self.names)
        self.names.append(worker)
        self._all = np.arange(len(self.names))

    def remove(self, worker: str) -> int:
        """Remove a worker. Returns its row, which the last worker has now."""
        row = self.row_of.pop(worker)
        last = self.names.pop()
        if last != worker:
            self.names[row] = last
            self.row_of[last] = row
        self._all = np.arange(len(self.names))
        return row


def longer(matrix: NDArray[Any]) -> NDArray[Any]:
    """Return the matrix with twice as many rows, and at least 8 new ones, so that a large fleet can join one by one."""
    return np.concatenate((matrix, np.zeros((max(8, len(matrix)), matrix.shape[1]), dtype=matrix.dtype)))


def row_products(rows: NDArray[np.float32] | NDArray[np.uint16], vector: NDArray[np.float32]) -> NDArray[np.float64]:
    """Scalar product of each row [W, D] with the vector [D], float64 [W]."""
    products = np.empty(len(rows))
    kernels.row_products(rows, vector, products)
    return products
