# SPDX-License-Identifier: Apache-2.0
"""What an operator writes: addresses, sizes, rates and peers, and the options of `postcopyd serve`.

Owns their spelling, what is allowed, and the defaults: `KEYS` and `PEER_KEYS` have what a file and
the command line may set. Opens nothing; where options come from is files.py's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from postcopyd.errors import PostcopydError

DEFAULT_CONTROL = "/run/postcopyd/control"
DEFAULT_PORT = 16525
DEFAULT_STATE_DIR = Path("/run/postcopyd/state")
DEFAULT_DURABLE_DIR = Path("/var/lib/postcopyd")
DEFAULT_LIBVIRT = "qemu:///system"
# Beyond a few, more connections only cost threads; the wire allows twice as many.
MAX_CONNECTIONS = 16
# Other daemons that are served at a time: each arriving migration has one connection (peers.py).
MAX_PEERS = 256
# Written in place of a value for "no limit" or "off".
NONE = "none"

_UNITS = {"": 1, "K": 1024, "M": 1024**2, "G": 1024**3}
# The ways a guest may be moved.
MODES = ("hybrid", "postcopy", "precopy")

May = Literal["send", "receive", "control"]
MAY: tuple[May, ...] = ("send", "receive", "control")


class Address(NamedTuple):
    """A TCP address. For a listener, an empty host means every address of the machine."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Peer(NamedTuple):
    """Another host by a name in its certificate, and what it may do: `send` guests to this host,
    `receive` guests of this host, and `control`, which is to ask (check without moving, look what
    became of a guest). Without an `address` it is not dialled by its name."""

    name: str
    address: Address | None = None
    may: frozenset[May] = frozenset(MAY)


class ServeOptions(NamedTuple):
    """How a daemon is to run. None is no limit. Bytes per second: `bandwidth` for one migration,
    `host_bandwidth` for all that leave this host together. `connections` is the number of push
    connections of one migration. An arrival beyond `max_arrivals` or `max_arriving_memory` (bytes
    of guest RAM) waits. `libvirt` is a URI, "off", or None where nobody says (`libvirt_uri`).
    `metrics` is HOST:PORT or the absolute path of a unix socket. Without `peers` every certificate
    of the CA is accepted."""

    control: str = DEFAULT_CONTROL
    listen: Address = Address("", DEFAULT_PORT)
    state_dir: Path = DEFAULT_STATE_DIR
    tls: Literal["require", "off"] = "require"
    tls_dir: Path = Path("/etc/pki/postcopyd")
    hooks_dir: Path | None = None
    bandwidth: int | None = None
    connections: int = 2
    durable_dir: Path | None = None
    host_bandwidth: int | None = None
    max_vms: int | None = None
    max_arrivals: int | None = None
    max_arriving_memory: int | None = None
    max_peers: int = MAX_PEERS
    metrics: str | None = None
    libvirt: str | None = None
    peers: tuple[Peer, ...] = ()

    @property
    def durable(self) -> Path:
        """`durable_dir`. If it is not set but `state_dir` is, a folder in that: a daemon with
        folders of its own touches no others."""
        default = self.state_dir / "durable"
        if self.state_dir == DEFAULT_STATE_DIR:
            default = DEFAULT_DURABLE_DIR
        return self.durable_dir or default

    @property
    def libvirt_uri(self) -> str:
        """Empty for none. Who may send a domain here has as much power as root. So without TLS,
        where whoever reaches the port may, it is only one that somebody has named."""
        default = DEFAULT_LIBVIRT if self.tls == "require" else "off"
        uri = self.libvirt or default
        return "" if uri == "off" else uri


def _invalid(sentence: str) -> PostcopydError:
    return PostcopydError(sentence, "InvalidRequest")


def parse_size(text: str) -> int:
    """Bytes, from a number with an optional K, M or G (powers of 1024). Raises PostcopydError."""
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].isalpha() else (text, "")
    # float() also takes 1e3, 1_000 and inf.
    if unit not in _UNITS or not number.isascii() or not number.replace(".", "", 1).isdigit():
        raise _invalid(f"cannot read {text!r} as a size: say a number, with K, M or G, like 1.5G")
    size = int(float(number) * _UNITS[unit]) if "." in number else int(number) * _UNITS[unit]
    if not 0 < size < 2**63:
        raise _invalid(f"{text!r} is out of range: say more than nothing and less than 8 EiB")
    return size


def parse_rate(text: str) -> int:
    """Bytes per second, spelled like a size. Raises PostcopydError."""
    return parse_size(text)


def parse_address(text: str, *, listening: bool = False) -> Address:
    """HOST[:PORT], with an IPv6 address in brackets; `listening` allows an empty host, * and port
    0. Raises PostcopydError."""
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        port = rest[1:] if rest else str(DEFAULT_PORT)
        good = bracket == "]" and ":" in host and rest[:1] in ("", ":")
    else:
        host, colon, port = text.partition(":")
        port = port if colon else str(DEFAULT_PORT)
        good = ":" not in port
        if not good:
            raise _invalid(f"cannot read {text!r}: an IPv6 address stands in brackets, [{text}]")
    if listening and host == "*":
        host = ""
    if _link_local(host):
        raise _invalid(
            f"cannot reach {text!r}: an address of fe80::/10 is one of a link, so say which, like "
            f"[{host}%eth0]"
        )
    good = good and (bool(host) or listening) and not any(c.isspace() or c == "\0" for c in host)
    good = good and port.isascii() and port.isdigit() and len(port) <= 5
    if not good or not (0 if listening else 1) <= int(port) <= 65535:
        raise _invalid(f"cannot read {text!r} as an address: say HOST or HOST:PORT")
    return Address(host, int(port))


def _link_local(host: str) -> bool:
    """Whether this is a link-local address, which needs an interface, and names none."""
    return re.match("fe[89ab][0-9a-f]:", host, re.IGNORECASE) is not None and "%" not in host


def parse_peer(text: str) -> tuple[str, dict[str, Any]]:
    """A name and what is set for it, by key: NAME[=ADDRESS][,may=send+receive+control]; `may=none`
    allows nothing. Raises PostcopydError."""
    name, *more = text.split(",")
    name, said, address = name.partition("=")
    values: dict[str, Any] = {"address": address} if said else {}
    for one in more:
        key, _, value = one.partition("=")
        if key != "may" or key in values:
            raise _invalid(f"cannot read {text!r}: say NAME, NAME=ADDRESS or NAME,may=send+receive")
        values["may"] = [] if value == NONE else value.split("+")
    try:
        return peer_name(name), {key: PEER_KEYS[key].read(value) for key, value in values.items()}
    except PostcopydError as error:
        raise _invalid(f"cannot read {text!r}: {error}") from None


def peer_name(name: str) -> str:
    """A name that a certificate may have, in small letters. Raises PostcopydError."""
    if not name or not name.isprintable() or any(c in " =,/" for c in name):
        raise _invalid("a peer's name is a DNS name or an IP address of its certificate")
    return name.lower()


def near(word: object, words: Iterable[str]) -> str:
    """The word that was probably meant, as the end of a sentence; "" if none is similar."""
    import difflib  # only needed after a mistake

    alike = difflib.get_close_matches(str(word).replace("_", "-"), list(words), 1)
    return f"; did you mean {alike[0]}?" if alike else ""


# --- readers of values: of text, and in a file of numbers and lists too --------------------------


class Key(NamedTuple):
    """One option. `read` makes its value from what was written; it raises PostcopydError that says
    what is allowed. `help` is for people, `metavar` is its placeholder there. A `number` is written
    without quotes in a file."""

    metavar: str
    read: Callable[[Any], Any]
    help: str
    number: bool = False

    def parse(self, text: str) -> Any:
        """The value of a word on the command line."""
        return self.read(int(text) if self.number and text.isascii() and text.isdigit() else text)


def _text(value: Any, wanted: str) -> str:
    if not isinstance(value, str) or not value or not value.isprintable():
        raise _invalid(f"{wanted} is expected, in quotes")
    return value


def _path(value: Any) -> str:
    return _text(value, "a path")


def _folder(value: Any) -> Path:
    return Path(_text(value, "a folder"))


def _listen(value: Any) -> Address:
    return parse_address(_text(value, "HOST or HOST:PORT"), listening=True)


def _rate(value: Any) -> int:
    if type(value) is int and abs(value) < 2**64:
        value = str(value)
    if not isinstance(value, str):
        raise _invalid('a whole number of bytes is expected, or one with K, M or G like "1.5G"')
    return parse_rate(value)


def _number(least: int, most: int) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        if type(value) is not int or not least <= value <= most:
            raise _invalid(f"a number from {least} to {most} is expected")
        return value

    return read


def _one_of(*words: str) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        if value not in words:
            allowed = " or ".join(f'"{word}"' for word in words)
            raise _invalid(f"{allowed} is expected{near(value, words)}")
        return str(value)

    return read


def _metrics(value: Any) -> str:
    text = _text(value, "HOST:PORT or the absolute path of a unix socket")
    if not text.startswith("/"):
        parse_address(text, listening=True)
        if not text.rpartition("]")[2].count(":"):
            raise _invalid("a port is expected, HOST:PORT, or the absolute path of a unix socket")
    return text


def _or_none(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def read_or_none(value: Any) -> Any:
        try:
            return None if value == NONE else read(value)
        except PostcopydError as error:
            raise _invalid(f'{error}; or "{NONE}"') from None

    return read_or_none


def _may(value: Any) -> frozenset[May]:
    wanted = 'a list of "send", "receive" and "control" is expected, like ["send", "receive"]'
    if not isinstance(value, list):
        raise _invalid(wanted)
    for one in value:
        if one not in MAY:
            raise _invalid(f"{wanted}, and not {one!r}{near(one, MAY)}")
    return frozenset(value)


_SOME = 100_000  # VMs, arrivals, peers: as good as no limit

KEYS: Mapping[str, Key] = {
    "control": Key("PATH", _path, "the control socket to open"),
    "listen": Key(
        "HOST:PORT", _listen, "where other daemons connect; * is every address of this host"
    ),
    "state-dir": Key("DIR", _folder, "records of migrations, for a daemon that restarts"),
    "durable-dir": Key("DIR", _folder, "records that must outlive a restart of this host"),
    "tls": Key(
        "require|off", _one_of("require", "off"), "between hosts; off only on a trusted network"
    ),
    "tls-dir": Key("DIR", _folder, "certificates and keys"),
    "hooks-dir": Key("DIR", _or_none(_folder), "programs to run at certain points of a migration"),
    "bandwidth": Key(
        "RATE",
        _or_none(_rate),
        "the most that one migration from here sends, in bytes per second",
    ),
    "host-bandwidth": Key(
        "RATE",
        _or_none(_rate),
        "the most that all migrations from here send together; they share it equally",
    ),
    "connections": Key(
        "N",
        _number(1, MAX_CONNECTIONS),
        "connections of one migration from here for pages that nobody waits for, "
        f"1 to {MAX_CONNECTIONS}",
        number=True,
    ),
    "max-vms": Key(
        "N",
        _or_none(_number(1, _SOME)),
        "the most VMs that can be attached; further ones are refused",
        number=True,
    ),
    "max-arrivals": Key(
        "N",
        _or_none(_number(1, _SOME)),
        "the most guests that arrive at a time; others wait for their turn",
        number=True,
    ),
    "max-arriving-memory": Key(
        "SIZE",
        _or_none(_rate),
        "the most RAM of all guests that arrive at a time; others wait, a larger one is refused",
    ),
    "max-peers": Key(
        "N",
        _number(2, _SOME),
        "the most other daemons that are served at a time; further ones are refused",
        number=True,
    ),
    "metrics": Key("HOST:PORT|PATH", _or_none(_metrics), "where to serve metrics to Prometheus"),
    "libvirt": Key(
        "URI|off",
        lambda value: _text(value, "a URI of libvirt, or off"),
        "the libvirt of this host, whose domains need not be attached",
    ),
}
"""Options of a daemon, by their name in a file and after -- on the command line. The fields of
ServeOptions have _ for -."""

PEER_KEYS: Mapping[str, Key] = {
    "address": Key(
        "HOST[:PORT]",
        lambda value: parse_address(_text(value, "HOST or HOST:PORT")),
        "where its daemon listens, for `--to NAME`",
    ),
    "may": Key("LIST", _may, "send: send guests here; receive: get guests from here; control: ask"),
}
"""Options of a peer, in [peers.NAME] of a file."""
