# SPDX-License-Identifier: Apache-2.0
"""Migrations over TLS, and who cannot take part in them."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from needs import missing
from pair import (
    LARGE,
    MIB,
    SMALL,
    Host,
    Pair,
    again,
    cli,
    completed,
    ended,
    filled,
    following,
    open_pair,
    status_until,
    unmoved,
    until,
    verified,
    worked,
)
from test_cut_connections import wire

from postcopyd import protocol as p
from postcopyd.demo.hosts import DemoError, certified
from postcopyd.errors import PostcopydError
from postcopyd.handover import Machine, Source
from postcopyd.net.codec import pack
from postcopyd.net.connection import dial, dial_control, dial_data, receive_object
from postcopyd.net.tls import Tls
from postcopyd.records.store import Store
from postcopyd.sessions.shared import Shared
from postcopyd.vmm.process.driver import ProcessVmm


@pytest.fixture(scope="module")
def daemons() -> Iterator[Pair]:
    """As those of other tests, with TLS."""
    with open_pair(tls=True) as pair:
        yield pair


def reloaded(host: Host) -> bool:
    return 'event="certificates reloaded"' in host.log.read_text()


async def test_cut_and_goes_on(pair: Pair) -> None:
    """A migration over TLS whose connections are cut goes on, with new keys, and with certificates
    that both hosts got meanwhile and have read on SIGHUP."""
    name, here, there = await pair.place(*LARGE)
    a, b = pair
    await filled(here)
    async with wire(b) as one:
        started = await a.call("Migrate", name=name, to=one.address, bandwidth=16 * MIB)
        await status_until(b, name, lambda status: status["phase"] == "postcopy")
        for host in (a, b):
            certified(pair.folder, host.name)
            assert host.process is not None
            host.process.send_signal(signal.SIGHUP)
            await until(partial(reloaded, host), "reloading")
        one.cut()
        result = await a.result(name, started["migration"])
        assert (result["event"], result["recoveries"]) == ("completed", 1)
        assert one.sent["control"].count(b"postcopyd control tls") == 2
        assert name.encode() not in one.sent["control"]  # in the clear
    await status_until(b, name, lambda status: status["phase"] == "drained")
    await ended(here)
    await verified(there)


@pytest.fixture
def daemons_to_end() -> Iterator[Pair]:
    with open_pair(tls=True) as pair:
        yield pair


async def test_guests_are_not_left_alone_for_a_certificate(daemons_to_end: Pair) -> None:
    """A daemon whose files are no good any more takes its guests over all the same, says what is
    wrong, and goes on once they are mended; without such guests it does not start."""
    pair = daemons_to_end
    name, _, there = await pair.place(*LARGE)
    a, b = pair
    started = await a.call("Migrate", name=name, to=b.address, bandwidth=16 * MIB)
    await status_until(b, name, lambda status: status["phase"] == "postcopy")
    key = pair.folder / f"{b.name}.tls/server-key.pem"
    b.end(signal.SIGKILL)
    key.chmod(0o644)
    await b.start()
    await status_until(b, name, lambda status: status["phase"] == "paused")
    await until(lambda: b.log.read_text().count("connection refused") > 1, "asking again")
    assert "chmod 600" in b.log.read_text()
    assert "systemctl reload postcopyd" in b.log.read_text()
    key.chmod(0o600)
    assert b.process is not None
    b.process.send_signal(signal.SIGHUP)
    result = await a.result(name, started["migration"])
    assert (result["event"], result["recoveries"]) == ("completed", 1)
    await verified(there)
    await status_until(b, name, lambda status: status["phase"] == "drained")
    b.end()
    key.chmod(0o644)
    with pytest.raises(DemoError, match="can be read by others"):
        await b.start()


async def test_hybrid(pair: Pair) -> None:
    """Passes over TLS, and the handover after them."""
    name, here, there = await pair.place(*SMALL)
    a, b = pair
    result = await a.migrate(name, b, mode="hybrid")
    completed(result, mode="hybrid")
    assert result["passes"]
    await ended(here)
    await verified(there)


def by_hand(pair: Pair, number: int) -> Shared:
    """What a test needs to be the source at one of the hosts."""
    folder = pair.folder / f"host{number}.tls"
    return Shared(Store(pair.folder / "by-hand"), connections=1, tls=Tls.load(folder))


async def test_key_of_another_migration(pair: Pair) -> None:
    """A key that is not this migration's opens no data connection, and costs it no place."""
    name, _, there = await pair.place()
    b = pair.hosts[1]
    shared, offer = by_hand(pair, 0), await offered(pair, name)
    channel = await dial_control(b.address, Machine(Source.GREETING), shared)
    async with channel, channel.alive():
        await channel.greet()
        await channel.send(offer)
        token = (await channel.expect(p.Ready)).token
        for wrong in (os.urandom(32), bytes(32)):
            with pytest.raises(PostcopydError, match="has the key of another migration"):
                await dial_data(b.address, shared, offer.migration, wrong, urgent=True)
        # Without TLS, with the token in the clear, and with a key behind another name.
        for kind in (p.DATA, p.DATA_TLS):
            raw = await dial("127.0.0.1", int(b.address.rpartition(":")[2]), kind)
            async with raw:
                await raw.send_all(pack(p.DataHello(offer.migration, token, True)))
                with pytest.raises((PostcopydError, trio.BrokenResourceError)):
                    await receive_object(raw, p.DataWelcome)
        wires = [
            await dial_data(b.address, shared, offer.migration, token, urgent=urgent)
            for urgent in (True, False)
        ]
        await channel.expect(p.Serving)
        for one in wires:
            one.close()
    log = b.log.read_bytes()
    assert b"key of another migration" in log
    for secret in (token, token.hex().encode(), repr(token).encode()[2:-1]):
        assert secret not in log
    await status_until(b, name, lambda status: status["phase"] == "failed")
    await again(pair, name, None if there.process.poll() is not None else there)


async def offered(pair: Pair, name: str) -> p.Offer:
    """What the source would offer of its guest, the last but one that was started."""
    a, guest = pair.hosts[0], pair.guests[-2]
    await a.call("Detach", name=name)
    vmm = await ProcessVmm.connect(name, str(guest.path))
    shape = await vmm.inspect("source")
    regions = [p.RegionOffer(r.name, r.pages, r.page_size) for r in shape.regions]
    facts = {key: p.fact(value) for key, value in shape.facts.items()}
    shape.close()
    await vmm.aclose()
    await pair.attach(a, name, guest)
    return p.Offer("by-hand", name, "process", regions, facts, 1, 1)


async def test_only_the_same_host_goes_on(pair: Pair) -> None:
    """A paused migration goes on with the host that it began with, and with no other one that the
    CA knows, at either side."""
    a, b = pair
    name, here, there = await following(pair)
    migration = (await a.status(name))["migration"]
    b.end()
    await status_until(a, name, lambda status: status["phase"] == "paused")
    # Another host of the same CA where the destination was.
    right, b.tls = b.tls, ("--tls-dir", str(certified(pair.folder, "host9", "localhost")))
    address, b.address = b.address, f"localhost:{b.address.rpartition(':')[2]}"
    await b.start()
    await a.call("Recover", name=name, to=b.address)
    status = await status_until(a, name, lambda status: "began with" in status["message"])
    assert "127.0.0.1, host1, and this is host9, localhost" in status["message"]
    b.end()
    b.tls, b.address = right, address
    # The right one again, and a source that is another host.
    impostor = Shared(
        Store(pair.folder / "impostor"),
        tls=Tls.load(certified(pair.folder, "host8", "127.0.0.8")),
    )
    await b.start()
    await b.status(name)  # it listens
    machine = Machine(Source.RAN_LOST)
    async with await dial_control(b.address, machine, impostor) as channel:
        await channel.greet()
        await channel.send(p.Resume(migration, name, 1))
        with pytest.raises(PostcopydError, match=r"began with 127.0.0.1, host0.*this is 127.0.0.8"):
            await channel.receive()
    # Its certificate may be another one of its name.
    certified(pair.folder, "host1")
    await a.call("Recover", name=name, to=b.address)
    await status_until(a, name, lambda status: status["phase"] == "drained", 60)
    await verified(there)
    await worked(there, 100)
    assert here.process.wait(10) is not None


async def test_strangers_and_the_careless(pair: Pair) -> None:
    """A host of another CA, and one without TLS, are told why and what to do; the guest stays."""
    a, b = pair
    stranger = pair.folder / "stranger"
    assert (await cli("certs", "--dir", str(stranger), "--host", "127.0.0.1"))[0] == 0
    tls = a.tls
    for options, why in (
        (("--tls-dir", str(stranger)), "it is not from the CA in ca-cert.pem here"),
        (("--tls", "off"), "the destination was started with TLS"),
    ):
        a.end()
        a.tls = options
        await a.start()
        name, here, _ = await pair.place()
        await unmoved(a, name, here, await a.migrate(name, b), why)
    a.end()
    a.tls = tls
    await a.start()


async def test_certs_for_openssl(tmp_path: Path) -> None:
    """What `certs` makes is what others take: chain, names, purposes; keys are nobody else's."""
    if shutil.which("openssl") is None:
        missing("openssl")
    one, two = tmp_path / "one", tmp_path / "two"
    status, said, _ = await cli("certs", "--dir", str(one), "--host", "Host1", "--host", "::1")
    assert status == 0 and any("host1, ::1" in line for line in said)
    status, said, _ = await cli(
        "certs", "--ca", str(one), "--dir", str(two), "--host", "host2.example"
    )
    assert status == 0
    assert {path.name for path in two.iterdir()} == {
        "ca-cert.pem", "server-cert.pem", "server-key.pem", "client-cert.pem", "client-key.pem",
    }  # fmt: skip
    for key in (*one.glob("*-key.pem"), *two.glob("*-key.pem")):
        assert key.stat().st_mode & 0o777 == 0o600
    assert one.stat().st_mode & 0o777 == 0o700

    async def openssl(*words: str) -> Any:
        return await trio.run_process(["openssl", *words], capture_stdout=True, check=False)

    for purpose, file in (("sslserver", "server-cert.pem"), ("sslclient", "client-cert.pem")):
        verify = ("verify", "-x509_strict", "-CAfile", str(one / "ca-cert.pem"))
        verify += ("-purpose", purpose, "-verify_hostname", "host2.example")
        assert (await openssl(*verify, str(two / file))).returncode == 0

    # Renewed by its CA, never replaced by another host's or another CA's.
    before = (two / "server-cert.pem").read_bytes()
    again = ("certs", "--ca", str(one), "--dir", str(two), "--host")
    status, _, err = await cli(*again, "host3")
    assert (status, "has the certificate of another host, host2.example" in err) == (1, True)
    status, _, err = await cli("certs", "--dir", str(two), "--host", "host2.example")
    assert (status, "not ca-key.pem" in err) == (1, True)
    other = ("certs", "--ca", str(tmp_path / "ca"), "--dir", str(two), "--host", "host2.example")
    status, _, err = await cli(*other)
    assert (status, "is that of another CA" in err) == (1, True)
    assert (two / "server-cert.pem").read_bytes() == before
    assert (await cli(*again, "host2.example"))[0] == 0
    assert (two / "server-cert.pem").read_bytes() != before
    Tls.load(two)
    assert not list(tmp_path.rglob(".*.new"))
