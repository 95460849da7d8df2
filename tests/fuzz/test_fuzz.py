"""The fuzz targets on their seeds, and on what hypothesis makes of them. `make fuzz` goes further."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import CHANGES, TARGETS

CORPUS = Path(__file__).parent / "corpus"
SEEDS = {name: sorted(path.read_bytes() for path in (CORPUS / name).iterdir()) for name in TARGETS}


@pytest.mark.parametrize("name", TARGETS)
def test_the_seeds(name: str) -> None:
    assert SEEDS[name], "a target without seeds"
    for seed in SEEDS[name]:
        TARGETS[name](seed)


@st.composite
def mutated(draw: st.DrawFn, name: str) -> bytes:
    """A seed with a few bytes replaced, taken out or put in, or bytes from nowhere."""
    data = bytearray(draw(st.sampled_from([*SEEDS[name], b""])))
    for _ in range(draw(st.integers(0, 6))):
        at = draw(st.integers(0, len(data)))
        data[at : at + draw(st.integers(0, 8))] = draw(st.binary(max_size=8))
    return bytes(data)


@pytest.mark.parametrize("name", TARGETS)
def test_mutations_of_the_seeds(name: str) -> None:
    @settings(max_examples=40, deadline=None)
    @given(mutated(name))
    def holds(data: bytes) -> None:
        TARGETS[name](data)

    holds()


@pytest.mark.parametrize("name", ["calibration", "trace"])
def test_files_with_changes_inside(name: str) -> None:
    @settings(max_examples=60, deadline=None)
    @given(st.binary(max_size=24))
    def holds(changes: bytes) -> None:
        TARGETS[name](CHANGES + changes)

    holds()
