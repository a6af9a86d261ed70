# SPDX-License-Identifier: Apache-2.0
"""An engine as Python sees it: the statistics it reads, and what both sides agree on by bitmaps."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from postcopyd._native import ffi

from postcopyd.dest.engine import DestinationEngine
from postcopyd.errors import PostcopydError
from postcopyd.native.engine import faults
from postcopyd.net.codec import pack, parse_message
from postcopyd.protocol import Progress
from postcopyd.source.engine import SourceEngine
from postcopyd.vmm import Region


def bucket_of(us: int) -> int:
    """The bucket that engine.c counts a latency in, by the rule in native.h."""
    if us < 8:
        return us
    log = us.bit_length() - 1
    return min(8 * log + (us >> (log - 3)) % 8, 255)


def stats_of(latencies: list[int]) -> Any:
    """Statistics as an engine has them after these latencies, in microseconds."""
    stats = ffi.new("struct pc_stats *")
    for us in latencies:
        stats.latency[bucket_of(us)] += 1
    stats.faults = len(latencies)
    stats.latency_max_ns = max(latencies, default=0) * 1000
    return stats


def test_no_fault_at_all() -> None:
    """An engine that has answered nothing has zeros and an empty histogram."""
    found = faults(stats_of([]))
    assert (found.count, found.p50_us, found.p99_us, found.max_us) == (0, 0.0, 0.0, 0.0)
    assert found.histogram == {}


def test_one_fault() -> None:
    """With one fault every percentile is its bucket's middle, the maximum exact."""
    found = faults(stats_of([100]))
    assert found.histogram == {"64": 1}
    assert found.p50_us == found.p99_us == 100.0  # the bucket from 96 to 104
    assert found.max_us == 100.0


def test_percentiles_lie_where_they_should() -> None:
    """Of 100 faults the 50th and the 99th count, and one slow one shows in the maximum only."""
    found = faults(stats_of([10] * 50 + [1000] * 49 + [50000]))
    assert abs(found.p50_us - 10) <= 10 / 8
    assert abs(found.p99_us - 1000) <= 1000 / 8
    assert found.max_us == 50000.0
    assert found.histogram == {"8": 50, "512": 49, "32768": 1}


def test_small_latencies_are_whole_microseconds() -> None:
    """Below 8 us each microsecond has a bucket; those below 1 count under 1."""
    found = faults(stats_of([0, 1, 2, 3, 4, 5, 6, 7]))
    assert found.histogram == {"1": 2, "2": 2, "4": 4}
    assert found.p50_us == 3.5


@given(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=60))
def test_percentiles_and_histogram_of_any_latencies(latencies: list[int]) -> None:
    """Percentiles are good to an eighth, the histogram is the log2 histogram, nothing is lost."""
    found = faults(stats_of(latencies))
    ordered = sorted(latencies)
    for share, value in ((0.5, found.p50_us), (0.99, found.p99_us)):
        exact = ordered[math.ceil(share * len(ordered)) - 1]
        assert abs(value - exact) <= max(1, exact / 8)
    assert found.histogram == {
        str(low): count
        for low, count in Counter(1 << max(us, 1).bit_length() - 1 for us in latencies).items()
    }
    assert sum(found.histogram.values()) == found.count == len(latencies)


def test_the_last_bucket_takes_all_that_is_slower() -> None:
    """A latency beyond the buckets is counted in the last one and passes the wire."""
    stats = stats_of([2**32])
    assert stats.latency[255] == 1
    found = faults(stats)
    assert found.histogram == {str(2**31): 1}
    assert found.max_us == 2**32


def test_statistics_fit_the_wire() -> None:
    """A full set of buckets is within what the protocol allows."""
    found = faults(stats_of([1 << n for n in range(32)] * 3))
    message = Progress(1, 2, found)
    assert parse_message({"type": "progress", **_object(pack(message))}) == message


def _object(packed: bytes) -> dict[str, Any]:
    import msgpack

    found: dict[str, Any] = msgpack.unpackb(packed)
    return found


DONE = 4
"""The state of a page in the record, as record.h has it."""


@asynccontextmanager
async def engines(record: bytes) -> AsyncIterator[tuple[DestinationEngine, SourceEngine]]:
    """A destination that goes on with this record of a guest of 100 pages, and a source of it."""
    record_fd, memory = os.memfd_create("record"), os.memfd_create("guest")
    region = Region("ram", 100, 4096, 0, memory, 0)
    opened: list[DestinationEngine | SourceEngine] = []
    try:
        os.truncate(memory, region.size)
        os.write(record_fd, record)
        destination = DestinationEngine([region], [-1], record_fd, staged=False)
        opened.append(destination)
        source = SourceEngine([region], os.getpid())
        opened.append(source)
        yield destination, source
    finally:
        for engine in opened:
            await engine.aclose()
        os.close(record_fd)
        os.close(memory)


async def test_what_the_destination_has() -> None:
    """Bitmaps of any part of a region begin with its first page and say what the record says."""
    has = [page % 3 == 0 or page > 90 for page in range(100)]
    record = bytes(DONE if page else 1 for page in has).ljust(128, b"\0")
    async with engines(record) as (destination, source):
        assert sum(has) == destination.stats.confirmed_pages
        for first, count in (0, 100), (1, 99), (7, 17), (99, 1), (100, 0), (0, 0):
            bits = destination.have(0, first, count)
            assert len(bits) == (count + 7) // 8
            number = int.from_bytes(bits, "little")
            assert has[first : first + count] == [bool(number >> i & 1) for i in range(count)]
            source.have(0, first, count, bits)
        with pytest.raises(PostcopydError, match="pages 90 to 101 of region 0"):
            destination.have(0, 90, 11)


@pytest.mark.parametrize(
    ("region", "first", "count", "size"),
    [
        (1, 0, 8, 1),
        (0, 93, 8, 1),
        (0, 0, 16, 1),
        (0, 0, 8, 2),
        (0, 0, -8, 0),
        (-1, 0, 8, 1),
        (0, -1, 8, 1),
        (0, 2**64 - 1, 8, 1),
        (2**32, 0, 8, 1),
        (0, 0, 2**64 + 8, 1),
    ],
)
async def test_a_peer_says_what_cannot_be(region: int, first: int, count: int, size: int) -> None:
    """Numbers that do not fit the guest are refused, whatever they are."""
    async with engines(bytes(128)) as (_, source):
        with pytest.raises(PostcopydError):
            source.have(region, first, count, b"\xff" * size)


async def test_a_record_of_another_guest() -> None:
    """A record whose size is not this guest's is refused."""
    with pytest.raises(PostcopydError, match="it is not this guest's"):
        async with engines(bytes(64)):
            pass
