# SPDX-License-Identifier: Apache-2.0
"""TLS between daemons: the certificates of this host, and who the peer on a connection is.

Owns the two TLS contexts and their files. A control connection is TLS 1.3 with a certificate of
both sides, each checked against `ca-cert.pem`. A data connection is TLS 1.3 with a pre-shared key
that came over the control connection: C does that (tls.c), `keyed` waits for it.
Knows nothing of migrations. What a peer may do is compared here; the daemon and sessions ask it.
"""

from __future__ import annotations

import errno
import math
import os
import socket
import ssl
import time
from collections.abc import Collection
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import structlog
import trio

from postcopyd._native import ffi, lib
from postcopyd.config.options import May, Peer
from postcopyd.errors import PostcopydError

CA, CRL = "ca-cert.pem", "ca-crl.pem"
SERVER = ("server-cert.pem", "server-key.pem")
CLIENT = ("client-cert.pem", "client-key.pem")

ALPN = "postcopyd"
"""Both sides name it. Certificates of this CA may serve other programs too, and without a name
anybody could redirect a connection to those (RFC 7301; the attack is ALPACA)."""

LOST = "ConnectionLost"
"""Name of an error that says no more of the peer than that it is away."""

SOON_DAYS = 30
"""A certificate that ends within so many days is warned about."""

Names = tuple[str, ...]
"""DNS and IP names of a certificate, sorted: who a peer is. Empty without TLS."""

DOES = {
    "send": "send guests to this host",
    "receive": "receive guests of this host",
    "control": "ask this host about guests",
}

log = structlog.get_logger()


class TlsFailed(PostcopydError):
    """A connection was not made because one side does not trust the other. If it was cut before
    that was known, its name is ConnectionLost: it may be tried again at once."""

    name = "TlsFailed"


class NotAllowed(PostcopydError):
    """The peer is who its certificate says, but may not do this."""

    name = "NotAllowed"


class Tls:
    """The certificates in use; `reload` replaces them for later connections. `ends` is when the
    first of them expires, in seconds since 1970."""

    def __init__(self, directory: Path, peers: tuple[Peer, ...]) -> None:
        self._directory = directory
        self._peers = peers
        self.ends = 0.0
        self._contexts: tuple[ssl.SSLContext, ssl.SSLContext] | None = None
        self._why = ""

    @classmethod
    def load(cls, directory: Path, peers: tuple[Peer, ...] = (), *, must: bool = True) -> Tls:
        """Reads the files in `directory`, or systemd's credentials of the same names. Raises
        PostcopydError for a file that is missing, unsafe, or would be refused by every peer. With
        `must` False that is only logged, and no peer is trusted until `reload`."""
        made = cls(directory, peers)
        try:
            made.reload()
        except PostcopydError as error:
            if must:
                raise
            made._why = f"{error}; then `systemctl reload postcopyd` (SIGHUP)"
            log.error("this daemon trusts no host and speaks with none", error=made._why)
        return made

    def reload(self) -> None:
        """Reads the files again. Raises PostcopydError; then the old ones stay in use."""
        self._contexts = self._read()

    def client(self, stream: trio.abc.Stream, host: str) -> trio.SSLStream[trio.abc.Stream]:
        """TLS to a peer whose certificate must name `host`. Raises PostcopydError."""
        host = host.partition("%")[0]  # the zone of an IPv6 address means something here only
        try:
            return trio.SSLStream(stream, self._usable()[0], server_hostname=host)
        except ValueError as error:
            raise TlsFailed(f"{host!r} cannot be the name of a certificate: {error}") from None

    def server(self, stream: trio.abc.Stream) -> trio.SSLStream[trio.abc.Stream]:
        """TLS from a peer. Raises PostcopydError."""
        return trio.SSLStream(stream, self._usable()[1], server_side=True)

    def _usable(self) -> tuple[ssl.SSLContext, ssl.SSLContext]:
        if self._contexts is None:
            raise TlsFailed(self._why)
        return self._contexts

    def allow(self, names: Names, *one_of: May) -> None:
        """Raises NotAllowed unless [peers] is empty, or lets one of these names do one of these."""
        if self._peers and not any(
            normal(peer.name) in names and peer.may.intersection(one_of) for peer in self._peers
        ):
            raise NotAllowed(
                f"{or_nobody(names)} may not {DOES[one_of[0]]}: [peers] in the configuration of "
                f"{socket.gethostname()} does not let it; name it there, with "
                f'may = ["{one_of[0]}"], if it shall'
            )

    def _path(self, name: str) -> Path:
        credentials = os.environ.get("CREDENTIALS_DIRECTORY")
        if credentials and (path := Path(credentials) / name).exists():
            return path
        return self._directory / name

    def _read(self) -> tuple[ssl.SSLContext, ssl.SSLContext]:
        for name in (CA, *SERVER, *CLIENT):
            self._safe(name)
        client = self._context(ssl.PROTOCOL_TLS_CLIENT, CLIENT)
        server = self._context(ssl.PROTOCOL_TLS_SERVER, SERVER)
        server.num_tickets = 0  # each connection has to show its certificate
        # Shows them to each other, so that what peers will object to is said at once.
        client.check_hostname = False
        ends = math.inf
        for name, certificate in self._shown(client, server):
            end = ssl.cert_time_to_seconds(certificate["notAfter"])
            ends, days = min(ends, end), (end - time.time()) / 86400
            if days < SOON_DAYS:
                log.warning(
                    "certificate ends soon", file=str(self._path(name)), days=round(days, 1)
                )
        client.check_hostname = True
        client.hostname_checks_common_name = False
        self.ends = ends
        return client, server

    def _safe(self, name: str) -> None:
        """Raises PostcopydError for a file that is missing, or a key that others can read."""
        path = self._path(name)
        try:
            with path.open("rb") as file:
                about = os.fstat(file.fileno())
        except OSError as error:
            raise _bad(f"TLS needs {path}: {error.strerror}", self._directory) from None
        # systemd protects credentials by their folder, and may use an ACL.
        if not name.endswith("-key.pem") or path.parent != self._directory:
            return
        if about.st_uid not in (0, os.geteuid()):
            raise PostcopydError(
                f"the key {path} belongs to user {about.st_uid}, who can read it: "
                f"`chown root {path}`, or make new ones",
                "InvalidRequest",
            )
        if about.st_mode & 0o077:
            raise PostcopydError(
                f"the key {path} can be read by others (mode {about.st_mode & 0o777:04o}): "
                f"`chmod 600 {path}`, and make new ones if somebody may have",
                "InvalidRequest",
            )

    def _context(self, protocol: int, files: tuple[str, str]) -> ssl.SSLContext:
        certificate, key = map(self._path, files)
        made = ssl.SSLContext(protocol)
        made.minimum_version = ssl.TLSVersion.TLSv1_3
        made.verify_mode = ssl.CERT_REQUIRED
        made.set_alpn_protocols([ALPN])
        reading = self._path(CA)
        try:
            made.load_verify_locations(reading)
            if (reading := self._path(CRL)).exists():
                made.load_verify_locations(reading)
                made.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
            reading = certificate
            made.load_cert_chain(certificate, key, password=_locked)
        except ssl.SSLError as error:
            if error.reason == "KEY_VALUES_MISMATCH":
                why = f"TLS: {key} is not the key of {certificate}"
            else:
                why = f"TLS: {reading if reading != certificate else f'{certificate} or {key}'} "
                why += f"is not what it should be, PEM ({error.reason})"
            raise _bad(why, self._directory) from None
        except (OSError, ValueError) as error:
            raise _bad(f"TLS: reading {reading}: {error}", self._directory) from None
        return made

    def _shown(
        self, client: ssl.SSLContext, server: ssl.SSLContext
    ) -> list[tuple[str, dict[str, Any]]]:
        """Our two certificates, each as the other side of a connection sees it."""
        up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
        ends = (
            (SERVER[0], client.wrap_bio(down, up)),
            (CLIENT[0], server.wrap_bio(up, down, server_side=True)),
        )
        for name, end in ends * 2:  # hello, answer, finished, done
            try:
                with suppress(ssl.SSLWantReadError):
                    end.do_handshake()
            except ssl.SSLError as error:
                raise _bad(
                    f"TLS: every peer would refuse {self._path(name)}: {_verdict(error)}",
                    self._directory,
                ) from None
        found = []
        for name, end in ends:
            certificate: dict[str, Any] = end.getpeercert() or {}
            if not certificate_names(certificate):
                raise _bad(f"TLS: {self._path(name)} names no host", self._directory)
            found.append((name, certificate))
        return found


def _bad(why: str, directory: Path) -> PostcopydError:
    return PostcopydError(
        f"{why}; `postcopyd certs --dir {directory} --host NAME` makes what is needed, "
        f"or say `--tls off` where you trust the network",
        "InvalidRequest",
    )


def _locked() -> str:
    """Called for a key with a password: there is nobody to ask."""
    raise ValueError("the key has a password: store it without one, readable by root only")


def normal(name: str) -> str:
    """A DNS or IP name in the form in which names of certificates are compared."""
    try:
        return str(ip_address(name))
    except ValueError:
        return name.lower().removesuffix(".")


def certificate_names(certificate: dict[str, Any]) -> Names:
    """The names in what `SSLObject.getpeercert` gives: subjectAltName, or if that is missing the
    common name, which is all that certificates for clients often have."""
    kinds = ("DNS", "IP Address")
    found = [name for kind, name in certificate.get("subjectAltName", ()) if kind in kinds]
    if not found:
        subject = certificate.get("subject", ())
        found = [name for rdn in subject for key, name in rdn if key == "commonName"]
    # They get into log lines and onto terminals.
    return tuple(sorted({normal(name) for name in found if name and name.isprintable()}))


def or_nobody(names: Names) -> str:
    return ", ".join(names) if names else "a peer without a certificate"


def same_peer(recorded: Collection[str], names: Names, vm: str) -> None:
    """Raises NotAllowed unless the peer is the one that the migration of a VM began with. One
    common name is enough: its certificate may have been renewed. Without TLS none was recorded."""
    if recorded and not set(recorded) & set(names):
        raise NotAllowed(
            f"the move of {vm} began with {', '.join(recorded)}, and this is {or_nobody(names)}: "
            f"only that host can go on with it, by a certificate with one of its names"
        )


# --- handshakes ----------------------------------------------------------------------------------


async def handshake(stream: trio.SSLStream[trio.abc.Stream], peer: str) -> Names:
    """Returns who the peer is. Raises TlsFailed; then the connection is useless, and the peer was
    told why. The caller limits the time."""
    try:
        await stream.do_handshake()
    except trio.BrokenResourceError as error:
        # trio does not send the alert that tells the peer why.
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await stream.transport_stream.send_all(stream._outgoing.read())
        raise TlsFailed(explain(error, peer), LOST if was_cut(error) else None) from None
    if stream.selected_alpn_protocol() != ALPN:
        raise TlsFailed(f"{peer} speaks TLS, but not for postcopyd: another program is there")
    names = certificate_names(stream.getpeercert() or {})
    if not names:
        raise TlsFailed(f"the certificate of {peer} names no host: make one with its names")
    return names


def refusal(error: trio.BrokenResourceError) -> bool:
    """Whether a connection broke because the peer does not trust this side. In TLS 1.3 the side
    that dialled learns of that only when it first reads."""
    cause = error.__cause__
    return isinstance(cause, ssl.SSLError) and "ALERT" in (cause.reason or "")


def was_cut(error: trio.BrokenResourceError) -> bool:
    """Whether the connection ended without TLS saying why."""
    cause = error.__cause__
    return isinstance(cause, ssl.SSLEOFError) or not isinstance(cause, ssl.SSLError)


def explain(error: trio.BrokenResourceError, peer: str) -> str:
    """A sentence on why TLS with a peer failed or broke, and what to do."""
    cause = error.__cause__
    if isinstance(cause, ssl.SSLCertVerificationError):
        return f"the certificate of {peer} is refused here: {_verdict(cause)}"
    if was_cut(error):
        return (
            f"{peer} ended the connection without any TLS ({cause or error}): it was cut, "
            f"or the daemon there is of a version without TLS"
        )
    assert isinstance(cause, ssl.SSLError)
    reason = cause.reason or str(cause)
    if "ALERT" in reason:
        why = _ALERTS.get(reason.rpartition("ALERT_")[2], f"it says {_words(reason)}")
        return f"{peer} refuses this host's certificate or TLS: {why}"
    why = _REASONS.get(reason, f"TLS fails, {_words(reason)}")
    return f"{peer}: {why}"


def _words(reason: str) -> str:
    return reason.rpartition("ALERT_")[2].lower().replace("_", " ")


def _verdict(error: ssl.SSLError) -> str:
    """What is wrong with a certificate. Codes: X509_V_ERR_* of openssl/x509_vfy.h."""
    code = getattr(error, "verify_code", 0)
    said = getattr(error, "verify_message", "") or error.reason or str(error)
    if code in (62, 64):  # HOSTNAME_MISMATCH, IP_ADDRESS_MISMATCH
        return (
            f"{said}: use a name that its certificate has, or give it a certificate with this name"
        )
    if code in (2, 18, 19, 20, 21):
        return (
            f"{said}: it is not from the CA in {CA} here, make both hosts' certificates with the "
            f"same CA"
        )
    if code == 10:
        return f"{said}: renew it, and see that the clocks of both hosts are right"
    if code == 9:
        return f"{said}: see that the clocks of both hosts are right"
    if code == 26:
        return f"{said}: a server needs a certificate for servers, a client one for clients"
    if code in (3, 11, 12):
        return f"{said}: renew {CRL} here, or remove it"
    return said


_CA = (
    f"its {CA} is not that of the CA of the certificates here, make both hosts' certificates with "
    f"the same CA"
)
_ALERTS = {
    "UNKNOWN_CA": _CA,
    "DECRYPT_ERROR": _CA,  # a CA with the same name and another key
    "CERTIFICATE_REQUIRED": f"it got no certificate, see that {CLIENT[0]} is there",
    "CERTIFICATE_EXPIRED": f"it has expired, renew {CLIENT[0]} here and check both clocks",
    "CERTIFICATE_REVOKED": f"it was revoked, by the {CRL} there; make a new one",
    "UNSUPPORTED_CERTIFICATE": f"it is not for clients, make {CLIENT[0]} with that purpose",
    "BAD_CERTIFICATE": "it is not valid there (yet), or does not have the name that was dialled; "
    "check both clocks and names",
    "PROTOCOL_VERSION": "it speaks no TLS 1.3, upgrade the older postcopyd",
    "UNEXPECTED_MESSAGE": "it does not expect what a postcopyd says first, another program may be "
    "there",
    "INTERNAL_ERROR": "it had an internal error, see its log",
}
_REASONS = {
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": f"it showed no certificate, it needs {CLIENT[0]}",
    "UNSUPPORTED_PROTOCOL": "it speaks TLS older than 1.3, which is refused",
    "WRONG_VERSION_NUMBER": "it does not speak TLS: it was started with `--tls off`; start both "
    "daemons with TLS, or both without",
    "HTTP_REQUEST": "it speaks HTTP: another program is there",
}


async def keyed(fd: int, *, server: bool, key: bytes, identity: str) -> Any:
    """TLS 1.3 with a pre-shared key on a non-blocking data connection. Returns a struct pc_tls for
    an engine, or for `lib.pc_tls_free`. Raises TlsFailed. The caller limits the time."""
    error = ffi.new("char[200]")
    tls = lib.pc_tls_new(fd, server, key, identity.encode(), error)
    if tls == ffi.NULL:
        raise TlsFailed(f"TLS of a data connection: {ffi.string(error).decode()}")
    try:
        while wants := lib.pc_tls_handshake(tls, error):
            if wants < 0:
                said = ffi.string(error).decode(errors="replace") or os.strerror(-wants)
                raise TlsFailed(
                    f"TLS of a data connection: {said}; it was cut, or has the key of another "
                    f"migration",
                    None if wants == -errno.EBADMSG else LOST,
                )
            wait = trio.lowlevel.wait_readable if wants == 1 else trio.lowlevel.wait_writable
            await wait(fd)
    except BaseException:
        lib.pc_tls_free(tls)
        raise
    return tls
