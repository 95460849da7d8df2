"""Where there is room when requests differ in the workers that they can use.

Every admitted request is promised a slot, and which one stays open until it is placed. With one more request, all
promises must still fit the free slots. So promises move, as in a maximum flow (Ford and Fulkerson 1956): a request may
take a slot that is promised, if that promise can move to another worker. The sets here are few: one for each
combination of workers that some model's requests are limited to.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping, Sequence

Need = tuple[Collection[str], int]


def spare(needs: Sequence[Need], free: Mapping[str, int]) -> set[str]:
    """Return the workers that can take one more request while every need that can be met still is.

    needs: groups of requests without a worker: the workers that each may use, and how many requests there are.
    free: worker -> free slots.
    """
    left = {worker: slots for worker, slots in free.items() if slots > 0}
    promised: list[dict[str, int]] = [{} for _ in needs]
    for index, (workers, count) in enumerate(needs):
        count -= _take(workers, count, left, promised[index])
        while count > 0 and _promise(index, workers, needs, left, promised):
            count -= 1
    return _reach(needs, left, promised)


def _take(workers: Collection[str], most: int, left: dict[str, int], held: dict[str, int]) -> int:
    """Promise up to `most` slots that are left. Returns how many."""
    taken = 0
    for worker in workers:
        slots = min(left.get(worker, 0), most - taken)
        if slots > 0:
            left[worker] -= slots
            held[worker] = slots
            taken += slots
    return taken


def _promise(
    index: int, workers: Collection[str], needs: Sequence[Need], left: dict[str, int], promised: list[dict[str, int]]
) -> bool:
    """Promise one slot to a request of `needs[index]`, and move other promises if needed. False if none is left."""
    # How each worker was reached: the need that would use it, and the worker that this need would leave.
    reached: dict[str, tuple[int, str | None]] = dict.fromkeys(workers, (index, None))
    line = deque(workers)
    while line:
        worker = line.popleft()
        if left.get(worker, 0) > 0:
            _move(worker, reached, left, promised)
            return True
        for other, held in enumerate(promised):
            if held.get(worker, 0) > 0:
                for target in needs[other][0]:
                    if target not in reached:
                        reached[target] = other, worker
                        line.append(target)
    return False


def _move(
    worker: str, reached: Mapping[str, tuple[int, str | None]], left: dict[str, int], promised: list[dict[str, int]]
) -> None:
    """Use a slot of `worker`, along the way on which it was reached."""
    left[worker] -= 1
    target: str | None = worker
    while target is not None:
        index, source = reached[target]
        promised[index][target] = promised[index].get(target, 0) + 1
        if source is not None:
            promised[index][source] -= 1
        target = source


def _reach(needs: Sequence[Need], left: Mapping[str, int], promised: Sequence[Mapping[str, int]]) -> set[str]:
    """The workers with a slot left, and those with a promise that could move to one of them, directly or not."""
    found = {worker for worker, slots in left.items() if slots > 0}
    grown = True
    while grown:
        grown = False
        for (workers, _), held in zip(needs, promised, strict=True):
            if found.isdisjoint(workers):
                continue
            for worker, count in held.items():
                if count > 0 and worker not in found:
                    found.add(worker)
                    grown = True
    return found
