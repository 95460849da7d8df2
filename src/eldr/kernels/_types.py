"""The arguments of the kernels."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.uint32]
Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

# Survival is kept in 16 bits, as a fraction of this.
CERTAIN = 65535


class FleetState(NamedTuple):
    """The W workers of a fleet. The policy keeps the arrays up to date.

    columns: float64 [4, W], seconds that a step takes: base, per expert, per token and per context token.
    union: float64 [W], the distinct experts of a step.
    context: W numbers, the tokens of running prompts.
    length: float32 [W], the length of each worker's direction.
    """

    columns: Doubles
    union: Doubles
    context: list[int]
    length: Floats


class PlacementWeights(NamedTuple):
    """The weights of the terms that expected-union adds up.

    others: the weight of the time that a newcomer adds to the requests already there.
    anchor: the weight of the distance to the nearest worker's direction.
    tail_guard: the margin of the tail guard, in units of what locality saves.
    guard_share: the share of expert time that counts as saved in addition.
    """

    others: float
    anchor: float
    tail_guard: float
    guard_share: float


class PrefillTerms(NamedTuple):
    """What the price of a prompt depends on, on workers that compute prompts.

    experts: the experts that a step can wait for, summed over layers.
    missed: the probability that a token of a prompt activates none of one expert.
    chunk_tokens: the tokens of a step, decodes included.
    others: the weight of the time that the requests there wait.
    """

    experts: float
    missed: float
    chunk_tokens: float
    others: float


# The buckets of the words of a text: 16 bits of their hashes.
WORD_BUCKETS = 65536
# Of a prompt in more pieces than this, the last ones are looked at.
WORD_PIECES = 1024
# Behind a cut, so many bytes are searched for a space.
WORD_NEAR_BYTES = 64

# The levels of arrays and objects that a JSON text may have. What reads requests reads far fewer (CPython's json 1,000
# to 10,000 by its version, and some 30,000 with the usual stack since 3.14), so nothing is refused that a worker takes.
JSON_DEPTH = 65536
# The members of one object that can be asked for, duplicates included. Objects have a few names, so this bounds memory.
JSON_MEMBERS = 1024

# What can be wrong with a JSON text, in the words of CPython's json where it has some, in the order of json_text.h.
JSON_FAULTS = (
    "",
    "Expecting value",
    "Expecting property name enclosed in double quotes",
    "Expecting ':' delimiter",
    "Expecting ',' delimiter",
    "Unterminated string",
    "Invalid control character",
    "Invalid \\escape",
    "Invalid UTF-8",
    "Extra data",
    f"More than {JSON_DEPTH} levels",
    "Expecting an object",
    f"More than {JSON_MEMBERS} members have one of a few names",
)
NO_OBJECT = JSON_FAULTS.index("Expecting an object")
TOO_MANY_MEMBERS = len(JSON_FAULTS) - 1

# A JSON value. An array or an object is its own text.
JsonValue = str | int | float | bool | bytes | None
# A member of a JSON object: its name, and where its value begins and ends, in bytes.
JsonMember = tuple[str, int, int]


class JsonTextError(ValueError):
    """Bytes that are not JSON, or not the object that is wanted.

    fault: an index into JSON_FAULTS.
    at: the byte at which it was noticed.
    """

    def __init__(self, fault: int, at: int) -> None:
        super().__init__(f"{JSON_FAULTS[fault]} at byte {at}")
        self.fault = fault
        self.at = at
