# SPDX-License-Identifier: Apache-2.0
"""What an operator writes: addresses, sizes and rates, and the options of `postcopyd serve`.

Owns their spelling, defaults and where they come from: the command line, then the environment,
then the file given with `--config`, then the defaults here. Opens nothing but that file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from postcopyd.errors import PostcopydError

DEFAULT_CONTROL = "/run/postcopyd/control"
DEFAULT_PORT = 16525
DEFAULT_STATE_DIR = Path("/run/postcopyd/state")
DEFAULT_DURABLE_DIR = Path("/var/lib/postcopyd")
# Beyond a few, more connections bring nothing but threads; the wire allows twice as many.
MAX_CONNECTIONS = 16

_UNITS = {"": 1, "K": 1024, "M": 1024**2, "G": 1024**3}
# The ways a guest may be moved.
MODES = ("hybrid", "postcopy", "precopy")

May = Literal["send", "receive", "control"]
MAY: tuple[May, ...] = ("send", "receive", "control")


class Address(NamedTuple):
    """A TCP address. An empty host, where one listens, means every address of the machine."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Peer(NamedTuple):
    """Another host by a name of its certificate, and what it may do: `send` guests to this host,
    `receive` guests of this host, and `control`: ask (check without moving, look what became of a
    guest). Without an `address` it is not dialled by its name."""

    name: str
    address: Address | None = None
    may: frozenset[May] = frozenset(MAY)


class ServeOptions(NamedTuple):
    """How a daemon is to run. None is no limit, rates are bytes per second, and of these `bandwidth`
    is that of one migration, `host_bandwidth` that of all that leave this host together;
    `connections` is the number of push connections of one migration. An arrival beyond
    `max_arrivals` or `max_arriving_memory` (bytes of guest RAM) waits. `metrics` is HOST:PORT or
    the absolute path of a unix socket. Without any `peers` each certificate of the CA will do."""

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
    max_peers: int = 256
    metrics: str | None = None
    peers: tuple[Peer, ...] = ()

    @property
    def durable(self) -> Path:
        """`durable_dir`, where it is not said beside a `state_dir` that is: a daemon with folders
        of its own touches no others."""
        default = self.state_dir / "durable"
        if self.state_dir == DEFAULT_STATE_DIR:
            default = DEFAULT_DURABLE_DIR
        return self.durable_dir or default


def _invalid(sentence: str) -> PostcopydError:
    return PostcopydError(sentence, "InvalidRequest")


def parse_size(text: str) -> int:
    """Bytes, from a number with an optional K, M or G (powers of 1024). Raises PostcopydError."""
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].isalpha() else (text, "")
    # float() knows more spellings of a number than people mean: 1e3, 1_000, inf.
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
    """HOST[:PORT], an IPv6 address in brackets; `listening` allows an empty host, * and port 0.

    Raises PostcopydError.
    """
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
    good = good and (bool(host) or listening) and not any(c.isspace() or c == "\0" for c in host)
    good = good and port.isascii() and port.isdigit() and len(port) <= 5
    if not good or not (0 if listening else 1) <= int(port) <= 65535:
        raise _invalid(f"cannot read {text!r} as an address: say HOST or HOST:PORT")
    return Address(host, int(port))


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise _invalid("a text is wanted")
    return value


def _tls(value: Any) -> Literal["require", "off"]:
    if value not in ("require", "off"):
        raise _invalid('"require" or "off" is wanted')
    return cast(Literal["require", "off"], value)


def _rate(value: Any) -> int:
    return parse_rate(str(value) if type(value) is int else _text(value))


def _connections(value: Any) -> int:
    if type(value) is not int or not 1 <= value <= MAX_CONNECTIONS:
        raise _invalid(f"a number from 1 to {MAX_CONNECTIONS} is wanted")
    return value


_KEYS = {
    "control": _text,
    "listen": lambda value: parse_address(_text(value), listening=True),
    "state-dir": lambda value: Path(_text(value)),
    "durable-dir": lambda value: Path(_text(value)),
    "tls": _tls,
    "tls-dir": lambda value: Path(_text(value)),
    "hooks-dir": lambda value: Path(_text(value)),
    "bandwidth": _rate,
    "connections": _connections,
}


def read_config(path: str) -> dict[str, Any]:
    """The options in a TOML file, by ServeOptions field. Raises PostcopydError."""
    import tomllib  # only `serve --config` needs it

    try:
        with open(path, "rb") as file:
            content = tomllib.load(file)
    except OSError as error:
        raise _invalid(f"cannot read the configuration {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise _invalid(f"cannot read the configuration {path}: {error}") from error
    options = {}
    for key, value in content.items():
        if key not in _KEYS:
            allowed = ", ".join(_KEYS)
            raise _invalid(f"{path} has an unknown key {key!r}: the keys are {allowed}")
        try:
            options[key.replace("-", "_")] = _KEYS[key](value)
        except PostcopydError as error:
            raise _invalid(f"{path}, key {key!r}: {error}") from error
    return options


def serve_options(given: Mapping[str, Any], config: str | None) -> ServeOptions:
    """Put options together; None in `given`, the command line's, means that it was not said.

    Raises PostcopydError.
    """
    options = read_config(config) if config else {}
    if control := os.environ.get("POSTCOPYD_CONTROL"):
        options["control"] = control
    options.update({key: value for key, value in given.items() if value is not None})
    return ServeOptions(**options)
