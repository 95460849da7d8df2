"""A bounded queue that is fair between clients: start-time fair queuing, and the longest queue gives way when full.

Goyal, Vin and Cheng: Start-time Fair Queuing, SIGCOMM 1996. There is no clock and no IO: virtual time is the cost that
has passed through.
"""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable
from typing import Generic, TypeVar

Item = TypeVar("Item")

# The cost of one item is capped here.
MAX_COST = 65536


class QueueFullError(Exception):
    """The queue is full, and the client already has its share of it."""


class FairQueue(Generic[Item]):
    """Items of clients that take turns. Clients that always have an item waiting get the same total cost through.

    In virtual time, a client's next item starts where its last one ended, or now if that is later. The earliest start
    goes first. Items must be distinct (hashed by identity or value).

    Each item waits in a line. Whoever pops says which lines may move, so that an item that cannot start holds up only
    those behind it in its line. The first item that a client has in a line counts as soon as it is the first, so that
    waiting in many lines gets a client no more through.

    limit: the most items that the queue holds.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._size = 0
        self._lines: dict[Hashable, _Line[Item]] = {}
        self._waiting: dict[bytes, int] = {}  # how many items each client has
        self._ends: dict[bytes, int] = {}
        self._now = 0
        self._entries = 0

    def __len__(self) -> int:
        return self._size

    @property
    def lines(self) -> Collection[Hashable]:
        """The lines with items."""
        return self._lines.keys()

    def push(self, item: Item, client: bytes, cost: int, line: Hashable = None) -> Item | None:
        """Add an item. If the queue is full, the newest item of the client with most items is removed and returned.

        Raises QueueFullError if that client is the one that pushes.
        """
        displaced = self._make_room(client) if self._size >= self.limit else None
        place = self._lines.get(line)
        if place is None:
            place = self._lines[line] = _Line()
        self._entries += 1
        items = place.clients.get(client)
        if items is None:
            items = place.clients[client] = OrderedDict()
        items[item] = (min(max(cost, 1), MAX_COST), self._entries)
        if len(items) == 1:
            self._line_up(client, place)
        self._size += 1
        self._waiting[client] = self._waiting.get(client, 0) + 1
        return displaced

    def pop(self, may_move: Callable[[Hashable], bool] = lambda line: True) -> Item | None:
        """Remove and return the next item of a line that may move, or None if there is none."""
        line, first = None, None
        for each, place in self._lines.items():
            turn = place.first()
            if (first is None or turn < first) and may_move(each):
                line, first = each, turn
        if first is None:
            return None
        start, _, client = first
        self._now = max(self._now, start)
        place = self._lines[line]
        item = next(iter(place.clients[client]))
        self._drop(item, client, line)
        if client in place.clients:
            self._line_up(client, place)
        return item

    def remove(self, item: Item, client: bytes, line: Hashable = None) -> bool:
        """Remove an item of a client. Returns False if it is not in the queue."""
        place = self._lines.get(line)
        items = None if place is None else place.clients.get(client)
        if items is None or item not in items:
            return False
        if next(iter(items)) == item and client in self._ends:  # it counted, and now the next one does, if there is one
            costs = [cost for cost, _ in itertools.islice(items.values(), 2)]
            self._ends[client] += sum(costs[1:]) - costs[0]
        self._drop(item, client, line)
        return True

    def take(self, line: Hashable) -> list[Item]:
        """Remove and return all items of a line."""
        place = self._lines.get(line)
        if place is None:
            return []
        found = [(item, client) for client, items in place.clients.items() for item in items]
        for item, client in found:
            self.remove(item, client, line)
        return [item for item, _ in found]

    def _line_up(self, client: bytes, place: _Line[Item]) -> None:
        """Give a client its turn for the first item that it has in a line."""
        self._entries += 1
        start = max(self._now, self._ends.get(client, 0))
        cost, _ = next(iter(place.clients[client].values()))
        self._ends[client] = start + cost
        place.line_up(client, start, self._entries)

    def _drop(self, item: Item, client: bytes, line: Hashable) -> None:
        place = self._lines[line]
        del place.clients[client][item]
        self._size -= 1
        self._waiting[client] -= 1
        if not self._waiting[client]:
            del self._waiting[client]
        if not place.clients[client]:
            place.leave(client)
            if not place.clients:
                del self._lines[line]
            self._forget()

    def _forget(self) -> None:
        """Forget clients with nothing waiting, unless they still have to make up for a recent item."""
        if not self._waiting:
            self._ends.clear()
            self._now = 0
        elif len(self._ends) > 2 * len(self._waiting) + 64:
            self._ends = {client: end for client, end in self._ends.items() if end > self._now}

    def _make_room(self, client: bytes) -> Item:
        own = self._waiting.get(client, 0)
        # A client that has its share need not look for one with more, so a flood from one client costs little.
        if own + 1 > self.limit / max(1, len(self._waiting)):
            raise QueueFullError
        longest = max(self._waiting, key=lambda other: self._waiting[other])
        if self._waiting[longest] <= own + 1:
            raise QueueFullError
        newest: tuple[int, Hashable, Item] | None = None
        for line, place in self._lines.items():
            items = place.clients.get(longest)
            if items:
                item = next(reversed(items))
                if newest is None or items[item][1] > newest[0]:
                    newest = items[item][1], line, item
        assert newest is not None
        _, line, item = newest
        self.remove(item, longest, line)
        return item


class _Line(Generic[Item]):
    """Items that can start under the same conditions: per client in order, and whose turn it is among the clients.

    clients: client -> item -> (cost, order of entry).
    """

    def __init__(self) -> None:
        self.clients: dict[bytes, OrderedDict[Item, tuple[int, int]]] = {}
        self._turns: dict[bytes, tuple[int, int]] = {}
        self._heap: list[tuple[int, int, bytes]] = []  # (start, order of entry, client); void unless in _turns

    def line_up(self, client: bytes, start: int, entry: int) -> None:
        self._turns[client] = start, entry
        heapq.heappush(self._heap, (start, entry, client))

    def leave(self, client: bytes) -> None:
        del self.clients[client], self._turns[client]

    def first(self) -> tuple[int, int, bytes]:
        """Whose turn is next, and from when. There must be one."""
        heap = self._heap
        while self._turns.get(heap[0][2]) != heap[0][:2]:
            heapq.heappop(heap)
        return heap[0]
