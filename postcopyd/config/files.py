# SPDX-License-Identifier: Apache-2.0
"""Collects the options of `postcopyd serve`: from files, the environment and the command line.

Owns which files are read and in what order, and that each mistake in them is reported with its file
and line. What a value may be is options.py's. Only `serve` loads this.

The files follow the UAPI Group's Configuration Files Specification (UAPI.6). The main file is the
one in the first of `FOLDERS` that has it. Then come the drop-ins, `postcopyd.toml.d/*.toml` in all
folders, in the order of their names; of two with one name, the one in the earlier folder counts.
Each file overrides, key by key, those before it. No file has to be there.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from postcopyd.config.options import (
    KEYS,
    NONE,
    PEER_KEYS,
    Address,
    Key,
    Peer,
    ServeOptions,
    near,
    peer_name,
)
from postcopyd.errors import PostcopydError

FOLDERS = (Path("/etc/postcopyd"), Path("/run/postcopyd"), Path("/usr/lib/postcopyd"))
FILE = "postcopyd.toml"

Where = tuple[str, ...]
"""A key with the tables around it: ("peers", "host2", "may")."""


class Said(NamedTuple):
    """A value, and where it comes from."""

    value: Any
    by: str


class Configuration(NamedTuple):
    """`said` has what was set anywhere, all else is default; `files` are those that were read."""

    options: ServeOptions
    said: Mapping[Where, Said]
    files: list[Path]

    def lines(self) -> Iterator[str]:
        """All options as a configuration file; each line says where its value comes from."""
        for file in self.files:
            yield f"# {file}"
        for name in KEYS:
            field = name.replace("-", "_")
            value = getattr(self.options, "durable" if name == "durable-dir" else field)
            yield self._line(name, value, (name,))
        for peer in self.options.peers:
            yield f"[peers.{json.dumps(peer.name)}]"
            for name in PEER_KEYS:
                value = getattr(peer, name)
                if value is not None:
                    yield self._line(name, value, ("peers", peer.name, name))

    def _line(self, name: str, value: Any, where: Where) -> str:
        by = self.said[where].by if where in self.said else "default"
        return f"{f'{name} = {_written(value)}':<48} # {by}"


def configuration(given: Mapping[str, Any], main: str | None = None) -> Configuration:
    """Puts the options together. `given` has what was set on the command line, by field; its peers
    are a list of what `options.parse_peer` returns. `main` is another main file, whose drop-ins are
    in the folder of the same name with .d appended. Raises PostcopydError with all mistakes, one on
    a line."""
    files = [Path(main), *_drop_ins([Path(f"{main}.d")])] if main else _files()
    said: dict[Where, Said] = {}
    mistakes: list[str] = []
    for file in files:
        _read(file, said, mistakes)
    if mistakes:
        raise PostcopydError("\n".join(mistakes), "InvalidRequest")
    if control := os.environ.get("POSTCOPYD_CONTROL"):
        said["control",] = Said(control, "$POSTCOPYD_CONTROL")
    for field, value in given.items():
        if field != "peers":
            said[field.replace("_", "-"),] = Said(value, "command line")
    for name, values in given.get("peers", ()):
        said["peers", name] = Said(name, "command line")
        for key, value in values.items():
            said["peers", name, key] = Said(value, "command line")
    return Configuration(put_together(said), said, files)


def put_together(said: Mapping[Where, Said]) -> ServeOptions:
    """The options, with defaults for what is not set."""
    options = {w[0].replace("-", "_"): one.value for w, one in said.items() if len(w) == 1}
    peers: dict[str, dict[str, Any]] = {}
    for where, one in said.items():
        if where[0] == "peers":
            peers.setdefault(where[1], {}).update({where[2]: one.value} if where[2:] else {})
    return ServeOptions(**options, peers=tuple(Peer(name, **peers[name]) for name in sorted(peers)))


def _written(value: Any) -> str:
    """A value as it is written in a file."""
    if isinstance(value, frozenset):
        return json.dumps(sorted(value))
    if isinstance(value, Address) and not value.host:
        return json.dumps(f"*{value}")
    return (
        str(value) if isinstance(value, int) else json.dumps(NONE if value is None else str(value))
    )


# --- files ---------------------------------------------------------------------------------------


def _files() -> list[Path]:
    """The main file, if there is one, and the drop-ins."""
    main = [folder / FILE for folder in FOLDERS if os.path.lexists(folder / FILE)][:1]
    return [*main, *_drop_ins([folder / f"{FILE}.d" for folder in FOLDERS])]


def _drop_ins(folders: list[Path]) -> list[Path]:
    """Drop-ins in order of name; of those with one name, the one in the first folder."""
    found: dict[str, Path] = {}
    for folder in folders:
        try:
            names = os.listdir(folder)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise _unreadable(folder, error) from None
        for name in names:
            if name.endswith(".toml") and not name.startswith("."):
                found.setdefault(name, folder / name)
    return [found[name] for name in sorted(found)]


def _unreadable(file: Path, error: OSError) -> PostcopydError:
    return PostcopydError(
        f"cannot read the configuration {file}: {error.strerror}", "InvalidRequest"
    )


def _read(file: Path, said: dict[Where, Said], mistakes: list[str]) -> None:
    """Adds what a file sets. Raises PostcopydError when it cannot be read at all."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise _unreadable(file, error) from None
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        mistakes.append(f"{file}, line {line}: this is not UTF-8 text")
        return
    take_text(text, file, said, mistakes)


def take_text(text: str, file: Path, said: dict[Where, Said], mistakes: list[str]) -> None:
    """Adds what the text of a file sets to `said`, and the sentences for its mistakes."""
    try:
        content = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # TOMLDecodeError; or int() has too many digits
        mistakes.append(f"{file}, {_what_is_broken(text, str(error))}")
        return
    lines: dict[Where, int] = {}
    for where, line in _stands(text):
        lines.setdefault(where, line)
    for where, value in _flat(content):
        by = f"{file}, line {lines[where]}"
        try:
            _take(where, value, said, Said(None, by))
        except PostcopydError as error:
            mistakes.append(f"{by}: {error}")


def _flat(table: Mapping[str, Any]) -> Iterator[tuple[Where, Any]]:
    """The keys of the file with their values; and those of each peer that is a table."""
    for key, value in table.items():
        if key != "peers" or not isinstance(value, dict):
            yield (key,), value
            continue
        for name, peer in value.items():
            yield (key, name), peer
            if isinstance(peer, dict):
                yield from (((key, name, inner), one) for inner, one in peer.items())


def _take(where: Where, value: Any, said: dict[Where, Said], by: Said) -> None:
    """Notes one value. Raises PostcopydError with the sentence for its mistake."""
    match where:
        case ("peers",):
            raise _wrong("peers is written in tables, [peers.NAME] with address and may")
        case ("peers", name):
            if not isinstance(value, dict):
                raise _wrong(
                    f"{_shown(name)} is not a table: write [peers.{_shown(name)}], and below it "
                    f"its keys: {', '.join(PEER_KEYS)}"
                )
            try:
                said["peers", peer_name(name)] = by._replace(value=name)
            except PostcopydError as error:
                raise _wrong(f"[peers.{_shown(name)}]: {error}") from None
        case ("peers", name, key):
            if key in KEYS and key not in PEER_KEYS:
                raise _wrong(
                    f"{key} is not a key of the table [peers.{_shown(name)}] above it: move it "
                    f"above the first table, [...], of this file"
                )
            if isinstance(value, dict) and key not in PEER_KEYS:
                raise _wrong(
                    f"[peers.{name}.{key}...] is a table within [peers.{_shown(name)}]: a name "
                    f'that has dots stands in quotes, like [peers."host2.example.org"]'
                )
            known = _known(key, PEER_KEYS, f"[peers.{_shown(name)}] has an unknown key")
            said["peers", name.lower(), key] = by._replace(value=_value(key, known, value))
        case (key,):
            known = _known(key, KEYS, "unknown key", "peers")
            said[key,] = by._replace(value=_value(key, known, value))


def _known(key: str, keys: Mapping[str, Key], what: str, *others: str) -> Key:
    if key not in keys:
        names = [*keys, *others]
        raise _wrong(f"{what} {_shown(key)}{near(key, names)}; the keys are {', '.join(names)}")
    return keys[key]


def _value(name: str, key: Key, value: Any) -> Any:
    try:
        read = key.read(value)
        if key.metavar in ("PATH", "DIR") and read is not None and not os.path.isabs(read):
            raise _wrong("an absolute path is expected, beginning with /")
    except PostcopydError as error:
        raise _wrong(f"{name} = {_shown(value)}: {error}") from None
    return read


def _shown(value: Any) -> str:
    """A value about as it is written in the file, and not too long."""
    if isinstance(value, dict):
        return "{...}"
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9_-]+", value):
        return f'"{value}"'
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _wrong(sentence: str) -> PostcopydError:
    return PostcopydError(sentence, "InvalidRequest")


# --- lines ---------------------------------------------------------------------------------------

_AT = re.compile(r"(.*) \(at (?:line (\d+), column (\d+)|end of document)\)", re.DOTALL)


def _stands(text: str) -> Iterator[tuple[Where, int]]:
    """Each key and table in a TOML text, with its line. In a text that is not TOML, those before
    the mistake.

    Neither tomllib nor tomlkit gives lines. But tomllib parses one statement by itself, with the
    header of its table before it, and refuses half a statement.
    """
    header, around = "", set[Where]()
    statement, line = "", 1
    for after, row in enumerate(text.split("\n"), 2):
        statement += f"{row}\n"
        heads = statement.lstrip(" \t").startswith("[")
        try:
            said = list(_paths(tomllib.loads(statement if heads else header + statement)))
        except (ValueError, RecursionError):
            continue
        yield from ((where, line) for where in said if heads or where not in around)
        if heads:
            header, around = statement, set(said)
        statement, line = "", after


def _paths(table: Mapping[str, Any], within: Where = ()) -> Iterator[Where]:
    for key, value in table.items():
        yield (*within, key)
        if isinstance(value, dict):
            yield from _paths(value, (*within, key))


def _twice(rows: list[str]) -> str:
    """Which key the last statement of these rows repeats, arrays of tables aside."""
    first: dict[Where, int] = {}
    again = ""
    for where, line in _stands("\n".join(rows)):
        if first.setdefault(where, line) != line:
            again = f"{'.'.join(where)} stands on line {first[where]} already"
    return again


def _what_is_broken(text: str, error: str) -> str:
    """Where a text is not TOML, and what is wrong there, in an operator's words."""
    found = _AT.fullmatch(error)
    what, line, column = found.groups() if found else (error, None, None)
    rows = text.split("\n")
    number, place = int(line or len(rows)), int(column or len(rows[-1]) + 1)
    if re.match("Cannot (overwrite|declare)", what) and (twice := _twice(rows[:number])):
        return f"line {number}: {twice}; write it once"
    hint = _hint(rows[number - 1])
    return f"line {number}, column {place}: {what[:1].lower()}{what[1:]}{hint}"


def _hint(row: str) -> str:
    """What the author of such a line probably meant."""
    name, equals, value = (part.strip() for part in row.partition("="))
    if not equals and re.match(r"[A-Za-z-]+[ :]", row.strip()):
        return "; a line is KEY = VALUE"
    if equals and value and re.match(r"[A-Za-z/*]|\d+[.:]?\d*[A-Za-z.:]", value):
        return f'; text stands in quotes, {name} = "{value}"'
    return ""
