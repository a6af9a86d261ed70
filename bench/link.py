# SPDX-License-Identifier: Apache-2.0
"""The engines over a link with a rate and a length: urgent latency while the push fills it.

`link.py [--rounds N] [--rates 1gbit,10gbit] [--trips MS,MS,...]`

Two network namespaces of our own, joined by veth; tbf at the source's end is the rate, delay.c at
the destination's end is the length. Needs root; touches nothing outside its namespaces. The
round trip's worth is what the same fault takes on the same link with nothing pushed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import table
from engine_vs_floor import BENCH, SOURCES, compile_to

SOURCE, DESTINATION = "192.0.2.1", "192.0.2.2"  # RFC 5737: addresses that are nobody's
PORT, PROXY = 7001, 7002
BURST = {"1gbit": "128k", "10gbit": "512k"}
QUEUE = "1m"
"""Bytes that may wait at the bottleneck, as in a switch."""
ALONE_MB, PUSH_MB = 4, {"1gbit": 96, "10gbit": 384}
GOAL = 1.5


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


class Link:
    """Two namespaces and the veth pair between them."""

    def __init__(self, rate: str) -> None:
        self.source, self.destination = (f"pcbench-{os.getpid()}-{end}" for end in "sd")
        self.rate = rate

    @property
    def inside(self) -> list[str]:
        """Before a command line: run at the destination."""
        return ["ip", "netns", "exec", self.destination]

    def open(self) -> None:
        for name in (self.source, self.destination):
            ip("netns", "add", name)
        ip("-n", self.source, "link", "add", "link0", "type", "veth", "peer", "name", "link0",
           "netns", self.destination)  # fmt: skip
        for name, address in ((self.source, SOURCE), (self.destination, DESTINATION)):
            ip("-n", name, "address", "add", f"{address}/30", "dev", "link0")
            for device in ("link0", "lo"):
                ip("-n", name, "link", "set", device, "up")
        tbf = ["rate", self.rate, "burst", BURST.get(self.rate, "256k"), "limit", QUEUE]
        tc = ["tc", "-n", self.source, "qdisc", "add", "dev", "link0"]
        subprocess.run([*tc, "root", "handle", "1:", "tbf", *tbf], check=True)
        # Below it what a network card has by default; one queue without bands would serve nobody.
        subprocess.run([*tc, "parent", "1:", "pfifo_fast"], check=True)

    def close(self) -> None:
        for name in (self.source, self.destination):
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


@contextmanager
def opened(rate: str) -> Iterator[Link]:
    link = Link(rate)
    try:
        link.open()
        yield link
    finally:
        link.close()


def measure(link: Link, programs: Path, trip_ms: float, push: int) -> dict[str, Any]:
    """One run of the engines. `trip_ms` 0: no proxy."""
    mb = PUSH_MB.get(link.rate, 96) if push else ALONE_MB
    to = f"127.0.0.1:{PROXY}" if trip_ms else f"{SOURCE}:{PORT}"
    proxy = None
    if trip_ms:
        half_us = str(int(trip_ms * 500))
        proxy = subprocess.Popen(
            [*link.inside, str(programs / "delay"), str(PROXY), SOURCE, str(PORT), half_us],
            stdout=subprocess.PIPE,
        )
        assert proxy.stdout is not None
        proxy.stdout.readline()
    try:
        words = [str(mb), "1", "16", "1", str(push), f"{SOURCE}:{PORT}", to]
        out = subprocess.run(
            [*link.inside, str(programs / "engine"), *words, f"/run/netns/{link.source}"],
            check=True, capture_output=True, timeout=60,
        )  # fmt: skip
    finally:
        if proxy is not None:
            proxy.kill()
            proxy.wait()
    found: dict[str, Any] = json.loads(out.stdout)
    return found | {"rate": link.rate, "rtt_ms": trip_ms, "push": push}


def rows_of(runs: list[dict[str, Any]], rates: list[str], trips: list[float]) -> list[table.Row]:
    rows = []
    for rate in rates:
        for trip in trips:
            by_push: list[list[dict[str, Any]]] = [[], []]
            for run in runs:
                if (run["rate"], run["rtt_ms"]) == (rate, trip):
                    by_push[run["push"]].append(run)
            alone, busy = by_push
            for p, goal in (("p50", GOAL), ("p99", None)):
                key = f"{p}_us"
                rows.append(
                    table.paired(
                        f"urgent {p} beside push, {rate}/s, {trip:g} ms away",
                        "us",
                        [run[key] for run in busy],
                        [run[key] for run in alone],
                        "alone",
                        goal,
                    )
                )
            rows.append(
                table.single(f"push rate, {rate}/s, {trip:g} ms away", "Gbit/s",
                             [run["GB/s"] * 8 * 1.073741824 for run in busy])
            )  # fmt: skip
    return rows


def main() -> int:
    """The exit status: table.MISSED when a goal is missed."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rates", default="1gbit,10gbit")
    parser.add_argument("--trips", default="0,0.2,1,5")
    options = parser.parse_args()
    rates = options.rates.split(",")
    trips = [float(trip) for trip in options.trips.split(",")]
    if os.geteuid():
        print("link: making network namespaces needs root; left out")
        return 0
    about = table.machine(rounds=options.rounds, queue=QUEUE)
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        programs = Path(folder)
        compile_to(programs / "engine", SOURCES)
        compile_to(programs / "delay", [BENCH / "delay.c"])
        for rate in rates:
            with opened(rate) as link:
                for _ in range(options.rounds):
                    for trip in trips:
                        runs += [measure(link, programs, trip, push) for push in (0, 1)]
    return table.finish("link", rows_of(runs, rates, trips), about, runs)


if __name__ == "__main__":
    raise SystemExit(main())
