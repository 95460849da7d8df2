"""A bounded queue that is fair between clients: start-time fair queuing, and the longest queue gives way when full.

Goyal, Vin and Cheng: Start-time Fair Queuing, SIGCOMM 1996. There is no clock and no IO: virtual time is the cost that
has passed through.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
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

    limit: the most items that the queue holds.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._size = 0
        self._clients: dict[bytes, OrderedDict[Item, int]] = {}
        self._turns: dict[bytes, tuple[int, int]] = {}
        self._heap: list[tuple[int, int, bytes]] = []  # (start, order of entry, client); void unless in _turns
        self._ends: dict[bytes, int] = {}
        self._now = 0
        self._entries = 0

    def __len__(self) -> int:
        return self._size

    def push(self, item: Item, client: bytes, cost: int) -> Item | None:
        """Add an item. If the queue is full, the newest item of the client with most items is removed and returned.

        Raises QueueFullError if that client is the one that pushes.
        """
        displaced = self._make_room(client) if self._size >= self.limit else None
        if client not in self._clients:
            self._clients[client] = OrderedDict()
            self._line_up(client)
        self._clients[client][item] = min(max(cost, 1), MAX_COST)
        self._size += 1
        return displaced

    def pop(self) -> Item | None:
        """Remove and return the next item, or None if there is none."""
        while self._heap:
            start, entry, client = heapq.heappop(self._heap)
            if self._turns.get(client) != (start, entry):
                continue
            self._now = start
            item, cost = next(iter(self._clients[client].items()))
            self._ends[client] = start + cost
            self.remove(item, client)
            if client in self._clients:
                self._line_up(client)
            return item
        return None

    def remove(self, item: Item, client: bytes) -> bool:
        """Remove an item of a client. Returns False if it is not in the queue."""
        items = self._clients.get(client)
        if items is None or items.pop(item, None) is None:
            return False
        self._size -= 1
        if not items:
            del self._clients[client], self._turns[client]
            self._forget()
        return True

    def _line_up(self, client: bytes) -> None:
        self._entries += 1
        turn = (max(self._now, self._ends.get(client, 0)), self._entries)
        self._turns[client] = turn
        heapq.heappush(self._heap, (*turn, client))

    def _forget(self) -> None:
        """Forget clients with nothing waiting, unless they still have to make up for a recent item."""
        if not self._clients:
            self._ends.clear()
            self._heap.clear()
            self._now = 0
        elif len(self._ends) > 2 * len(self._clients) + 64:
            self._ends = {client: end for client, end in self._ends.items() if end > self._now}

    def _make_room(self, client: bytes) -> Item:
        own = len(self._clients.get(client, ()))
        # A client that has its share need not look for one with more, so a flood from one client costs little.
        if own + 1 > self.limit / max(1, len(self._clients)):
            raise QueueFullError
        longest = max(self._clients, key=lambda other: len(self._clients[other]))
        if len(self._clients[longest]) <= own + 1:
            raise QueueFullError
        item = next(reversed(self._clients[longest]))
        self.remove(item, longest)
        return item
