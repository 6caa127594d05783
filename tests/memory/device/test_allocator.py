"""The allocator's rules one by one, as torch's source states them."""

from __future__ import annotations

import pytest

from lowmem.memory.device.allocator import MIB, Allocator, OutOfMemoryError, simulate


@pytest.mark.parametrize(
    ("size", "segment"),
    [
        (1, 2 * MIB),
        (MIB, 2 * MIB),
        (MIB + 1, 20 * MIB),
        (10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB),
        (11 * MIB, 12 * MIB),
        (33 * MIB + 1, 34 * MIB),
    ],
)
def test_segment_sizes(size, segment):
    a = Allocator()
    a.malloc(size)
    assert a.reserved == segment


def test_small_requests_share_a_segment_and_round_to_512():
    a = Allocator()
    blocks = [a.malloc(1000) for _ in range(2048)]
    assert (a.reserved, a.allocated) == (2 * MIB, 2 * MIB)
    a.malloc(1)
    assert a.reserved == 4 * MIB
    assert len({b.address for b in blocks}) == 2048


def test_a_large_block_keeps_a_remainder_of_up_to_one_mebibyte():
    a = Allocator()
    a.free(a.malloc(12 * MIB))
    block = a.malloc(11 * MIB)  # remainder of 1 MiB: not split
    assert block.size == 12 * MIB
    a.free(block)
    assert a.malloc(10 * MIB).size == 10 * MIB  # remainder of 2 MiB: split
    assert a.malloc(MIB + MIB // 2).size == 2 * MIB
    assert a.reserved == 12 * MIB


def test_best_fit_takes_the_smallest_block_then_the_lowest_address():
    a = Allocator()
    big, small = a.malloc(40 * MIB), a.malloc(20 * MIB)
    low, other = small.address, big.address
    a.free(big)
    a.free(small)
    assert a.malloc(18 * MIB + 512).address == low != other


def test_freed_neighbours_coalesce():
    a = Allocator()
    parts = [a.malloc(5 * MIB) for _ in range(4)]
    assert a.reserved == 20 * MIB
    for block in (parts[1], parts[3], parts[2], parts[0]):
        a.free(block)
    a.malloc(19 * MIB)
    assert a.reserved == 20 * MIB


def test_segments_do_not_coalesce():
    a = Allocator()
    first, second = a.malloc(20 * MIB), a.malloc(20 * MIB)
    a.free(first)
    a.free(second)
    a.malloc(30 * MIB)
    assert a.reserved == 70 * MIB


def test_at_the_limit_cached_segments_are_returned_once():
    a = Allocator(capacity=50 * MIB)
    first, second = a.malloc(20 * MIB), a.malloc(20 * MIB)
    a.free(first)
    a.free(second)
    a.malloc(50 * MIB)
    assert (a.retries, a.reserved) == (1, 50 * MIB)
    with pytest.raises(OutOfMemoryError):
        a.malloc(512)


STREAM = [1, 2, 3, -2, 4, -3, -4]  # weights 1 stay; 2 and 3 overlap; 4 follows
SIZES = [16 * MIB, 20 * MIB, 20 * MIB, 40 * MIB]


def test_steps_are_replayed_with_state_and_scratch():
    free = simulate(STREAM, SIZES, 1, [24 * MIB], [(len(STREAM), 2 * MIB)])
    assert free.word == "fits"
    assert free.allocated == (16 + 24 + 60) * MIB
    assert free.reserved >= free.allocated


def test_verdicts_by_capacity():
    growing, sizes = [1, 2, -2, 3, -3, 4, -4], [16 * MIB, 20 * MIB, 40 * MIB, 60 * MIB]
    words = {size: simulate(growing, sizes, 1, [], [], capacity=size * MIB).word for size in (136, 76, 75)}
    assert words == {136: "fits", 76: "fits with retries", 75: "out of memory"}


def test_state_in_a_cached_block_can_cost_a_segment():
    # the state of 24 MiB is cut from the block of 60, which the next step then has to allocate anew
    growing, sizes = [1, 2, -2], [16 * MIB, 60 * MIB]
    assert simulate(growing, sizes, 1, [24 * MIB], [], capacity=120 * MIB).word == "out of memory"
    assert simulate(growing, sizes, 1, [24 * MIB], []).reserved == 136 * MIB


def test_reserved_never_undercuts_allocated_and_never_exceeds_the_capacity():
    for capacity in (None, 110 * MIB, 130 * MIB):
        verdict = simulate(STREAM, SIZES, 1, [24 * MIB], [], capacity=capacity)
        assert verdict.reserved >= verdict.allocated
        assert capacity is None or verdict.reserved <= capacity
