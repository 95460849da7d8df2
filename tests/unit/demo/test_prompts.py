"""The demo's prompts: enough kinds, all different, the same for the same seed, with openings to share."""

from collections import Counter

import pytest

from eldr.demo.load import MAX_TOKENS_RANGE, make_requests
from eldr.demo.prompts import MAX_PROMPT_BYTES, MAX_PROMPTS_PER_KIND, make_prompts, mix_kinds
from eldr.workloads.kinds import KINDS


def test_every_kind_has_its_share() -> None:
    assert len(KINDS) >= 4
    counts = Counter(prompt.kind for prompt in make_prompts(10 * len(KINDS) + 3, seed=1))
    assert set(counts) == set(KINDS)
    assert max(counts.values()) - min(counts.values()) <= 1


def test_prompts_differ_from_each_other_and_from_the_excluded() -> None:
    first = make_prompts(600, seed=1)
    known = frozenset(prompt.text for prompt in first)
    second = make_prompts(600, seed=1, exclude=known)
    assert len({prompt.text for prompt in [*first, *second]}) == 1200


def test_a_seed_fixes_prompts_and_requests() -> None:
    assert make_prompts(50, seed=7) == make_prompts(50, seed=7)
    assert make_prompts(50, seed=7) != make_prompts(50, seed=8)
    prompts = make_prompts(50, seed=7)
    assert make_requests(prompts, seed=1) == make_requests(prompts, seed=1)
    assert make_requests(prompts, seed=1) != make_requests(prompts, seed=2)


def test_prompts_are_of_moderate_length_and_fully_filled_in() -> None:
    for prompt in make_prompts(800, seed=3):
        assert 80 <= len(prompt.text.encode()) <= MAX_PROMPT_BYTES
        assert "$" not in prompt.text


def test_many_prompts_share_whole_cache_blocks() -> None:
    """Within a kind, a good part of the prompts begins with the same block."""
    block_bytes = 32
    by_kind: dict[str, list[bytes]] = {}
    for prompt in make_prompts(400, seed=3):
        by_kind.setdefault(prompt.kind, []).append(prompt.text.encode())
    for texts in by_kind.values():
        starts = Counter(text[:block_bytes] for text in texts)
        assert max(starts.values()) > len(texts) / 4


def test_more_prompts_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match="demo prompts"):
        make_prompts(MAX_PROMPTS_PER_KIND * len(KINDS) + 1, seed=0)


def test_requests_are_numbered_and_their_lengths_vary_within_the_range() -> None:
    requests = make_requests(make_prompts(100, seed=0), seed=0)
    assert [request.number for request in requests] == list(range(100))
    lengths = {request.max_tokens for request in requests}
    assert min(lengths) >= MAX_TOKENS_RANGE[0]
    assert max(lengths) <= MAX_TOKENS_RANGE[1]
    assert len(lengths) > 10


@pytest.mark.parametrize("count", [8, 48, 51, 100])
def test_mixed_prompts_are_the_same_ones_with_every_kind_at_even_distances(count: int) -> None:
    prompts = make_prompts(count, seed=3)
    mixed = mix_kinds(prompts)
    assert sorted(prompt.text for prompt in mixed) == sorted(prompt.text for prompt in prompts)
    for kind in KINDS:
        own = [prompt for prompt in prompts if prompt.kind == kind]
        assert [prompt for prompt in mixed if prompt.kind == kind] == own
        for end in range(count):
            expected = len(own) * end / count
            assert abs(sum(prompt.kind == kind for prompt in mixed[:end]) - expected) <= 1.5


def test_mixed_prompts_have_no_fixed_order_of_kinds() -> None:
    mixed = mix_kinds(make_prompts(16, seed=3))
    assert {prompt.kind for prompt in mixed[:8]} == {prompt.kind for prompt in mixed[8:]} == set(KINDS)
    assert [prompt.kind for prompt in mixed[:8]] != [prompt.kind for prompt in mixed[8:]]
