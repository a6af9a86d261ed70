# SPDX-License-Identifier: Apache-2.0
"""TLS between daemons: whose certificate is taken, and what each side is told when it is not."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import msgpack
import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.x509.oid import ExtendedKeyUsageOID
from postcopyd._native import lib
from structlog.testing import capture_logs

from postcopyd import protocol as p
from postcopyd.cli import certs
from postcopyd.config.options import Address, Peer
from postcopyd.daemon.daemon import Daemon
from postcopyd.errors import PostcopydError
from postcopyd.handover import Machine, Source
from postcopyd.net import connection
from postcopyd.net.channel import ConnectionLost, PeerError
from postcopyd.net.codec import Codec
from postcopyd.net.connection import dial_control, peer_of
from postcopyd.net.tls import NotAllowed, Tls, TlsFailed, certificate_names, keyed, same_peer
from postcopyd.records.store import Store
from postcopyd.sessions.shared import Shared
from postcopyd.source.retry import MENDS

HERE = "127.0.0.1"
OURS, OTHERS = certs.new_authority(), certs.new_authority()
SERVERS = (ExtendedKeyUsageOID.SERVER_AUTH,)
PAST = datetime.now(UTC) - timedelta(days=2)
OFFER = p.Offer("m1", "web1", "process", [p.RegionOffer("ram", 512, 4096)], {}, 2, 1)


def written(
    folder: Path,
    *names: str,
    name: str = "localhost",
    ca: certs.Authority = OURS,
    trusted: certs.Authority | None = None,
    **how: Any,
) -> Path:
    """The five files of a host; `name` instead of this host's address."""
    here = [HERE] if name == "localhost" else []
    certificate, key = certs.host(ca, list(names or (*here, name)), **how)
    folder.mkdir(parents=True, exist_ok=True)
    pem = serialization.Encoding.PEM
    (folder / "ca-cert.pem").write_bytes((trusted or ca).certificate.public_bytes(pem))
    for role in ("server", "client"):
        (folder / f"{role}-cert.pem").write_bytes(certificate.public_bytes(pem))
        path = folder / f"{role}-key.pem"
        path.touch(0o600)
        path.write_bytes(certs._private(key))
    return folder


def unchecked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Tls:
    """With files that no daemon would start with: they were good when it did."""
    with monkeypatch.context() as patched:
        patched.setattr(Tls, "_shown", lambda *_: [])
        return Tls.load(folder)


# --- files ---------------------------------------------------------------------------------------


def lacks(folder: Path) -> None:
    (folder / "client-key.pem").unlink()


def shows_key(folder: Path) -> None:
    (folder / "server-key.pem").chmod(0o640)


def gives_key_away(folder: Path) -> None:
    os.chown(folder / "client-key.pem", 4711, -1)


def mixes_keys(folder: Path) -> None:
    shutil.copy(written(folder / "b") / "server-key.pem", folder / "server-key.pem")


def expired(folder: Path) -> None:
    written(folder, ends=PAST)


def of_another_ca(folder: Path) -> None:
    written(folder, ca=OTHERS, trusted=OURS)


def for_servers_only(folder: Path) -> None:
    written(folder, purposes=SERVERS)


def spoilt(folder: Path) -> None:
    (folder / "client-cert.pem").write_text("certificate")


def locks_key(folder: Path) -> None:
    key = certs.new_authority().key
    locked = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"secret"),
    )
    (folder / "server-key.pem").write_bytes(locked)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lacks, "client-key.pem: No such file"),
        (shows_key, "can be read by others (mode 0640): `chmod 600"),
        (gives_key_away, "belongs to user 4711"),
        (mixes_keys, "server-key.pem is not the key of"),
        (expired, "server-cert.pem: certificate has expired: renew it"),
        (of_another_ca, "it is not from the CA in ca-cert.pem"),
        (for_servers_only, "certificate purpose: a server needs"),
        (spoilt, "client-cert.pem or"),
        (locks_key, "has a password"),
    ],
)
def test_files_that_will_not_do(spoil: Any, says: str, tmp_path: Path) -> None:
    """A daemon does not start with files that are missing, unsafe, or would be refused."""
    spoil(written(tmp_path))
    with pytest.raises(PostcopydError) as caught:
        Tls.load(tmp_path)
    assert says in str(caught.value)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    assert "PRIVATE" not in str(caught.value)


def test_credentials_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """systemd's credentials are taken by the same names; how they are kept is its business."""
    given = written(tmp_path / "given")
    (given / "server-key.pem").chmod(0o440)  # as with an ACL
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(given))
    Tls.load(tmp_path / "nothing")


def test_end_is_warned_of(tmp_path: Path) -> None:
    """A certificate that ends within a month is named in the log."""
    soon = datetime.now(UTC) + timedelta(days=9, hours=1)
    with capture_logs() as logs:
        Tls.load(written(tmp_path, ends=soon))
    assert [(log["event"], log["days"]) for log in logs] == [("certificate ends soon", 9.0)] * 2


def test_names_of_a_certificate() -> None:
    """Names are compared in one spelling; a common name counts where there is no other."""
    names = (("DNS", "Web1.Example."), ("IP Address", "FD00:0:0:0:0:0:0:1"), ("URI", "x"))
    assert certificate_names({"subjectAltName": names}) == ("fd00::1", "web1.example")
    subject = ((("organizationName", "o"),), (("commonName", "host1"),))
    assert certificate_names({"subject": subject}) == ("host1",)
    assert certificate_names({"subject": subject, "subjectAltName": names[:1]}) == ("web1.example",)
    assert certificate_names({"subject": ((("commonName", "a\nb"),),)}) == ()


# --- connections ---------------------------------------------------------------------------------


class Server:
    """A daemon that listens, and its log."""

    def __init__(self, port: int, daemon: Daemon, logs: list[Any]) -> None:
        self.port = port
        self.to = f"{HERE}:{port}"
        self.daemon = daemon
        self.logs = logs

    async def said(self, text: str) -> None:
        """Waits for a line of the log."""
        with trio.fail_after(5):
            while not any(text in str(line.get("error")) for line in self.logs):
                await trio.sleep(0.01)


@asynccontextmanager
async def serving(folder: Path, tls: Tls | None) -> AsyncIterator[Server]:
    with capture_logs() as logs:
        async with trio.open_nursery() as nursery:
            daemon = Daemon(Shared(Store(folder / "state"), tls=tls), nursery)
            listeners = await trio.open_tcp_listeners(0, host=HERE)
            nursery.start_soon(trio.serve_listeners, daemon.serve_peer, listeners)
            yield Server(listeners[0].socket.getsockname()[1], daemon, logs)
            nursery.cancel_scope.cancel()


def source(folder: Path, tls: Tls | None, *peers: Peer) -> Shared:
    return Shared(Store(folder / "source"), tls=tls, peers=peers)


async def asked(shared: Shared, to: str, message: p.Message = OFFER) -> Any:
    """What a daemon answers to an offer."""
    async with await dial_control(to, Machine(Source.GREETING), shared) as channel:
        await channel.greet()
        await channel.send(message)
        return await channel.receive()


async def refused(shared: Shared, to: str) -> PostcopydError:
    with trio.fail_after(8), pytest.raises(PostcopydError) as caught:
        await asked(shared, to)
    assert "\n" not in str(caught.value)
    return caught.value


async def test_both_know_each_other(tmp_path: Path) -> None:
    """Behind TLS everything is as without: the offer is read, and answered."""
    tls = Tls.load(written(tmp_path / "tls"))
    async with serving(tmp_path, tls) as server:
        error = await refused(source(tmp_path, tls), server.to)
    assert (error.name, "no VM web1 is attached" in str(error)) == ("NoSuchVm", True)


class Bad(NamedTuple):
    """How the files of one side are made, and what each side says of them."""

    theirs: dict[str, Any]
    ours: dict[str, Any]
    here: str
    there: str


@pytest.mark.parametrize(
    "bad",
    [
        Bad(
            {},
            {"ca": OTHERS, "trusted": OURS},
            "hosts' certificates with the same CA",
            "not from the CA",
        ),
        Bad(
            {"ca": OTHERS}, {}, "not from the CA in ca-cert.pem here", "ca-cert.pem is not that of"
        ),
        Bad({}, {"ends": PAST}, "it has expired, renew client-cert.pem", "has expired"),
        Bad({"ends": PAST}, {}, "has expired: renew it", "it has expired"),
        Bad(
            {"name": "host9"}, {}, "IP address mismatch", "does not have the name that was dialled"
        ),
        Bad({}, {"purposes": SERVERS}, "it is not for clients", "certificate purpose"),
    ],
    ids=["our CA", "their CA", "ours expired", "theirs expired", "name", "purpose"],
)
async def test_certificates_are_checked(bad: Bad, tmp_path: Path, monkeypatch: Any) -> None:
    """Both sides say whose certificate is refused, why, and what to do."""
    there = unchecked(written(tmp_path / "theirs", **bad.theirs), monkeypatch)
    here = unchecked(written(tmp_path / "ours", **bad.ours), monkeypatch)
    async with serving(tmp_path, there) as server:
        error = await refused(source(tmp_path, here), server.to)
        assert (error.name, bad.here in str(error)) == ("TlsFailed", True), error
        await server.said(bad.there)


async def test_revoked(tmp_path: Path) -> None:
    """A certificate on the list of revoked ones is refused."""
    folder = written(tmp_path / "theirs")
    mine = written(tmp_path / "ours")
    mine_cert = x509.load_pem_x509_certificate((mine / "client-cert.pem").read_bytes())
    now = datetime.now(UTC)
    revoked = x509.RevokedCertificateBuilder().serial_number(mine_cert.serial_number)
    crl = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(OURS.certificate.subject)
        .last_update(now - timedelta(hours=1))
        .next_update(now + timedelta(days=1))
        .add_revoked_certificate(revoked.revocation_date(now).build())
        .sign(OURS.key, hashes.SHA256())
    )
    (folder / "ca-crl.pem").write_bytes(crl.public_bytes(serialization.Encoding.PEM))
    async with serving(tmp_path, Tls.load(folder)) as server:
        error = await refused(source(tmp_path, Tls.load(mine)), server.to)
        assert "it was revoked" in str(error)
        await server.said("certificate revoked")


async def by_hand(port: int, context: ssl.SSLContext) -> str:
    """What another program meets that speaks TLS behind the kind of a connection."""
    context.check_hostname = False
    async with await connection.dial(HERE, port, p.CONTROL_TLS) as raw:
        stream = trio.SSLStream(raw, context, server_hostname=HERE)
        try:
            await stream.send_all(b"x")
            await stream.receive_some()
        except trio.BrokenResourceError as error:
            return str(error.__cause__)
    return ""


async def test_other_clients(tmp_path: Path) -> None:
    """No certificate, an older TLS, and TLS of another program: refused by name."""
    folder = written(tmp_path / "tls")
    async with serving(tmp_path, Tls.load(folder)) as server:
        nobody = ssl.create_default_context(cafile=str(folder / "ca-cert.pem"))
        assert "CERTIFICATE_REQUIRED" in await by_hand(server.port, nobody)
        await server.said("it showed no certificate")
        older = ssl.create_default_context(cafile=str(folder / "ca-cert.pem"))
        older.maximum_version = ssl.TLSVersion.TLSv1_2
        assert "PROTOCOL_VERSION" in await by_hand(server.port, older)
        await server.said("TLS older than 1.3")
        other = ssl.create_default_context(cafile=str(folder / "ca-cert.pem"))
        other.load_cert_chain(folder / "client-cert.pem", folder / "client-key.pem")
        await by_hand(server.port, other)
        await server.said("not for postcopyd")


# --- one side has no TLS -------------------------------------------------------------------------


async def test_without_tls_to_a_daemon_with(tmp_path: Path) -> None:
    """Both are told that the destination has TLS and the source has not."""
    async with serving(tmp_path, Tls.load(written(tmp_path / "tls"))) as server:
        error = await refused(source(tmp_path, None), server.to)
        assert "the destination was started with TLS" in str(error)
        assert "start both with TLS" in str(error)
        await server.said("the destination was started with TLS")
        async with await connection.dial(HERE, server.port, p.DATA) as stream:
            assert await stream.receive_some() == b""


async def test_with_tls_to_a_daemon_without(tmp_path: Path) -> None:
    """Both are told that the source has TLS and the destination has not."""
    async with serving(tmp_path, None) as server:
        error = await refused(source(tmp_path, Tls.load(written(tmp_path / "tls"))), server.to)
        assert "was started with `--tls off`" in str(error)
        await server.said("the destination was started without TLS")


async def test_with_tls_to_an_older_version(tmp_path: Path) -> None:
    """A daemon that knows no TLS ends the connection at its first byte; the sentence says so."""

    async def old(stream: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError):
            async with stream:
                assert await stream.receive_some(1) != b"\xb1"

    tls = Tls.load(written(tmp_path / "tls"))
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, old, 0)
        to = f"{HERE}:{listeners[0].socket.getsockname()[1]}"
        error = await refused(source(tmp_path, tls), to)
        nursery.cancel_scope.cancel()
    assert "of a version without TLS" in str(error)
    assert error.name == "ConnectionLost"  # as for one that was cut: it is tried again at once


async def test_older_version_to_us(tmp_path: Path) -> None:
    """One that has the same protocol and less fields works where there is no TLS."""
    async with serving(tmp_path, None) as server:
        async with await connection.dial(HERE, server.port, p.CONTROL) as stream:
            offer = {
                "type": "offer", "migration": "m1", "vm": "web1", "driver": "process", "epoch": 1,
                "regions": [{"name": "ram", "pages": 1, "pageSize": 4096}], "facts": {},
                "connections": 2,
            }  # fmt: skip
            packer = msgpack.Packer()
            await stream.send_all(packer.pack({"type": "hello", "version": 1}))
            await stream.send_all(packer.pack(offer))
            codec, found = Codec(), []
            async for data in stream:
                codec.feed(bytes(data))
                found += [obj["type"] for obj in codec.objects()]
        assert found[0] == "hello" and found[-1] == "error"
        async with await connection.dial(HERE, server.port, p.CONTROL) as stream:
            await stream.send_all(packer.pack({"type": "hello", "version": 0}))
            await server.said("speaks protocol version 0")


# --- what a peer may do --------------------------------------------------------------------------


async def test_peers_are_held_to_what_they_may(tmp_path: Path) -> None:
    """Who is not in the list, or may not do it, is refused by name after TLS."""
    ours = Tls.load(written(tmp_path / "ours", "Host1", HERE))
    only_checks = (Peer("HOST1", None, frozenset({"control"})), Peer("host2"))
    there = Tls.load(written(tmp_path / "theirs"), only_checks)
    async with serving(tmp_path, there) as server:
        error = await refused(source(tmp_path, ours), server.to)
        assert isinstance(error, PeerError) and error.name == "NotAllowed"
        assert "127.0.0.1, host1 may not send guests to this host: [peers]" in str(error)
        await server.said("may not send guests")
        shared = source(tmp_path, ours)
        with pytest.raises(PeerError, match="no VM web1"):  # it may ask
            await asked(shared, server.to, p.Resume("m", "web1", 1, look=True))
        with pytest.raises(PeerError, match="no VM web1"):
            await asked(shared, server.to, p.Offer(
                "m1", "web1", "process", [p.RegionOffer("ram", 1, 4096)], {}, 1, 1, check=True
            ))  # fmt: skip
        with pytest.raises(PeerError, match="may not send"):
            await asked(shared, server.to, p.Resume("m", "web1", 1))


def test_list_of_peers(tmp_path: Path) -> None:
    """Without [peers] each certificate will do; with some each may do what is said of it."""
    folder = written(tmp_path)
    Tls.load(folder).allow(("anybody",), "send")
    tls = Tls.load(folder, (Peer("host1", None, frozenset({"send"})), Peer("FD00::1")))
    tls.allow(("fd00::1",), "receive")
    tls.allow(("host1",), "control", "send")
    with pytest.raises(NotAllowed, match=r'may not receive guests .* may = \["receive"\]'):
        tls.allow(("host1",), "receive")
    with pytest.raises(NotAllowed, match="anybody may not ask"):
        tls.allow(("anybody",), "control")


def test_peers_by_name(tmp_path: Path) -> None:
    """A peer with an address is dialled there, and its certificate must have its name."""
    peers = (Peer("host2", Address("192.0.2.2", 17000)), Peer("host3"))
    shared = source(tmp_path, None, *peers)
    assert peer_of("Host2", shared) == (Address("192.0.2.2", 17000), "host2")
    assert peer_of("host2:18000", shared) == (Address("192.0.2.2", 18000), "host2")
    assert peer_of("host3", shared) == (Address("host3", 16525), "host3")
    assert peer_of("[fe80::1%2]:7", shared) == (Address("fe80::1%2", 7), "fe80::1%2")


async def test_name_of_a_peer_is_checked(tmp_path: Path) -> None:
    """Dialled as host2, a host whose certificate says otherwise is refused, and host2 is not."""
    tls = Tls.load(written(tmp_path / "ours"))
    for name, wanted in (("host2", "no VM web1"), ("host3", "Hostname mismatch")):
        async with serving(tmp_path, Tls.load(written(tmp_path / name, name))) as server:
            peer = Peer("host2", Address(HERE, server.port))
            assert wanted in str(await refused(source(tmp_path, tls, peer), "host2"))


def test_same_peer() -> None:
    """One name in common is the same host; nothing is asked of a move that began without TLS."""
    same_peer(["host1", "192.0.2.1"], ("192.0.2.1",), "web1")
    same_peer([], ("host2",), "web1")
    same_peer([], (), "web1")
    for names, said in ((("host2",), "this is host2"), ((), "a peer without a certificate")):
        with pytest.raises(NotAllowed, match=f"web1 began with host1, and {said}|{said}"):
            same_peer(["host1"], names, "web1")


# --- while connections live ----------------------------------------------------------------------


@asynccontextmanager
async def talking(folder: Path, tls: Tls) -> AsyncIterator[tuple[connection.Channel, Any]]:
    """A channel of the source, and the raw connection behind it at a proxy's other side."""
    async with serving(folder, tls) as server:
        channel = await dial_control(server.to, Machine(Source.GREETING), source(folder, tls))
        async with channel:
            await channel.greet()
            yield channel, server


async def test_cut_is_no_end(tmp_path: Path) -> None:
    """A control connection that ends without close_notify was cut, whoever did it."""
    tls = Tls.load(written(tmp_path / "tls"))
    async with talking(tmp_path, tls) as (channel, _):
        raw: Any = channel._stream
        raw.transport_stream.socket.shutdown(socket.SHUT_RD)
        with pytest.raises(ConnectionLost, match=r"broke: .*EOF"):
            await channel.receive()


async def test_end_is_said(tmp_path: Path) -> None:
    """A side that ends a connection says so within TLS."""
    tls = Tls.load(written(tmp_path / "tls"))
    async with talking(tmp_path, tls) as (channel, _):
        await channel.send(OFFER)
        with pytest.raises(PeerError):
            await channel.receive()
        with pytest.raises(ConnectionLost, match="closed the connection"):
            await channel.receive()


async def test_reload(tmp_path: Path) -> None:
    """New files count for new connections; those that live go on; bad ones are not taken."""
    folder = written(tmp_path / "tls", HERE, "old")
    tls = Tls.load(folder)
    async with talking(tmp_path, tls) as (channel, server):
        assert "old" in channel.names
        (folder / "client-cert.pem").write_text("half")
        with pytest.raises(PostcopydError, match=r"client-cert.pem or"):
            tls.reload()
        again = await dial_control(server.to, Machine(Source.GREETING), source(tmp_path, tls))
        async with again:
            assert "old" in again.names
        written(folder, HERE, "new")
        tls.reload()
        await channel.send(OFFER)
        with pytest.raises(PeerError, match="no VM web1"):
            await channel.receive()
        again = await dial_control(server.to, Machine(Source.GREETING), source(tmp_path, tls))
        async with again:
            assert again.names == (HERE, "new")


# --- data connections ----------------------------------------------------------------------------


async def both_keyed(*sides: tuple[bytes, str]) -> list[str]:
    """TLS by keys and identities, the client's first: what each side says, empty when done."""
    ends = socket.socketpair()
    said = ["", ""]

    async def side(number: int) -> None:
        key, identity = sides[number]
        fd = ends[number].fileno()
        try:
            tls = await keyed(fd, server=number == 1, key=key, identity=identity)
        except TlsFailed as error:
            said[number] = str(error)
            ends[number].shutdown(socket.SHUT_RDWR)
        else:
            lib.pc_tls_free(tls)

    for end in ends:
        end.setblocking(False)
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(side, 0)
            nursery.start_soon(side, 1)
    for end in ends:
        end.close()
    return said


async def test_key_of_a_migration() -> None:
    """Both have the key, and mean the same connection; otherwise neither gets any further."""
    key = os.urandom(32)
    assert await both_keyed((key, "m1 push"), (key, "m1 push")) == ["", ""]
    for other in ((os.urandom(32), "m1 push"), (key, "m1 urgent"), (key, "m2 push")):
        said = await both_keyed((key, "m1 push"), other)
        assert all("has the key of another migration" in one for one in said), said
        assert not any(key.hex() in one or repr(key)[2:-1] in one for one in said)


async def test_handshake_is_cut() -> None:
    """Says nothing of keys: a source that asks again after a pause does so at once."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.close()
    with ours, pytest.raises(TlsFailed) as failed:
        await keyed(ours.fileno(), server=True, key=bytes(32), identity="m1 push")
    assert failed.value.name in MENDS


async def test_handshake_may_be_called_off() -> None:
    """A peer that connects and says nothing is given up at any time."""
    ours, theirs = socket.socketpair()
    with ours, theirs, trio.move_on_after(0.05) as scope:
        ours.setblocking(False)
        await keyed(ours.fileno(), server=True, key=bytes(32), identity="m1 push")
    assert scope.cancelled_caught
