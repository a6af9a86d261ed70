# SPDX-License-Identifier: Apache-2.0
"""Where the options of `serve` come from, and what is said of mistakes in them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from postcopyd.cli.main import main
from postcopyd.config import files
from postcopyd.config import options as config
from postcopyd.config.files import configuration
from postcopyd.config.options import KEYS, PEER_KEYS, Address, Peer, ServeOptions
from postcopyd.errors import PostcopydError

EXAMPLE = Path(__file__).resolve().parents[2] / "systemd/postcopyd.toml"


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """As /etc, /run and /usr/lib."""
    made = [tmp_path / name for name in ("etc", "run", "lib")]
    monkeypatch.setattr(files, "FOLDERS", made)
    monkeypatch.delenv("POSTCOPYD_CONTROL", raising=False)
    return made


def write(file: Path, content: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content)
    return file


def mistakes(file: Path, content: str) -> str:
    """What is said of a file, without its name."""
    with pytest.raises(PostcopydError) as raised:
        configuration({}, str(write(file, content)))
    said = str(raised.value)
    assert all(line.startswith(f"{file}, line ") for line in said.splitlines())
    return said.replace(f"{file}, ", "")


# --- where options come from ---------------------------------------------------------------------


def test_without_files() -> None:
    """A host without any file has the defaults, and nothing is limited but what ever was."""
    assert configuration({}).options == ServeOptions()
    assert configuration({}).files == []
    assert ServeOptions().max_peers == 256


def test_files_in_their_order(folders: list[Path]) -> None:
    """One main file counts, of drop-ins with one name the first; all override in order of name."""
    etc, run, lib = folders
    write(etc / "postcopyd.toml", "connections = 3\nmax-vms = 3\nbandwidth = 3\n")
    write(lib / "postcopyd.toml", "connections = 4\nmax-peers = 40\n")
    write(lib / "postcopyd.toml.d/50-b.toml", "max-vms = 5\nmax-arrivals = 5\n")
    write(run / "postcopyd.toml.d/50-b.toml", "max-vms = 6\n")
    write(etc / "postcopyd.toml.d/40-a.toml", "max-vms = 7\n")
    write(lib / "postcopyd.toml.d/60-c.toml", 'bandwidth = "none"\n')
    write(lib / "postcopyd.toml.d/.60-d.toml", "connections = 9\n")
    write(lib / "postcopyd.toml.d/60-e.toml.bak", "connections = 9\n")
    options = configuration({}).options
    assert options == ServeOptions(connections=3, max_vms=6)
    write(run / "postcopyd.toml.d/60-c.toml", "")  # masks
    assert configuration({}).options.bandwidth == 3
    (etc / "postcopyd.toml").unlink()
    assert configuration({}).options == ServeOptions(connections=4, max_peers=40, max_vms=6)


def test_another_main_file(folders: list[Path], tmp_path: Path) -> None:
    """A file that is named counts alone, with the drop-ins beside it."""
    write(folders[0] / "postcopyd.toml", "connections = 3\n")
    write(folders[0] / "postcopyd.toml.d/a.toml", "max-vms = 3\n")
    mine = write(tmp_path / "mine.toml", "max-peers = 5\n")
    write(tmp_path / "mine.toml.d/x.toml", "max-arrivals = 5\n")
    assert configuration({}, str(mine)).options == ServeOptions(max_peers=5, max_arrivals=5)
    with pytest.raises(PostcopydError, match="cannot read the configuration /no/file: No such"):
        configuration({}, "/no/file")


def test_the_command_line_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An option comes from the command line, else the environment, the file, the default."""
    file = write(
        tmp_path / "postcopyd.toml",
        'control = "/file"\nlisten = "*:7"\nstate-dir = "/state"\ntls = "off"\n'
        'tls-dir = "/tls"\nhooks-dir = "/hooks"\nbandwidth = "1G"\nconnections = 4\n'
        'host-bandwidth = 5\nmax-arriving-memory = "2.5G"\nmetrics = "/m"\ndurable-dir = "/d"\n',
    )
    options = configuration({}, str(file)).options
    expected = ServeOptions(
        "/file", Address("", 7), Path("/state"), "off", Path("/tls"), Path("/hooks"), 1 << 30, 4,
        Path("/d"), 5, max_arriving_memory=5 << 29, metrics="/m",
    )  # fmt: skip
    assert options == expected
    monkeypatch.setenv("POSTCOPYD_CONTROL", "/env")
    given = {"bandwidth": None, "metrics": None, "connections": 5}
    options = configuration(given, str(file)).options
    assert options == expected._replace(control="/env", bandwidth=None, metrics=None, connections=5)
    assert configuration({"control": "/said"}, str(file)).options.control == "/said"


def test_peers(tmp_path: Path) -> None:
    """A peer is put together from all who speak of it, and without a word may do all."""
    file = write(
        tmp_path / "c.toml",
        '[peers.Host2]\naddress = "10.0.0.2"\n[peers."10.0.0.3"]\nmay = ["send"]\n'
        '[peers.host4]\naddress = "[::1]:7"\nmay = []\n',
    )
    write(tmp_path / "c.toml.d/1.toml", 'peers.host2.may = ["control", "receive"]\n')
    given = {"peers": [config.parse_peer("host4,may=send+control"), config.parse_peer("host5")]}
    assert configuration(given, str(file)).options.peers == (
        Peer("10.0.0.3", None, frozenset({"send"})),
        Peer("host2", Address("10.0.0.2", 16525), frozenset({"control", "receive"})),
        Peer("host4", Address("::1", 7), frozenset({"send", "control"})),
        Peer("host5", None, frozenset({"send", "control", "receive"})),
    )
    address = {"address": Address("h", 7)}
    assert config.parse_peer("a=h:7,may=none") == ("a", {**address, "may": frozenset()})
    for bad in ("", "a b", "a,may=", "a,may=all", "a,mayn", "a=h,may=send,may=send", "a=:1"):
        with pytest.raises(PostcopydError):
            config.parse_peer(bad)


def test_durable_folder(tmp_path: Path) -> None:
    """It is on disk by default, and for a daemon with a state directory of its own within that."""
    assert configuration({}).options.durable == Path("/var/lib/postcopyd")
    said = {"state_dir": Path("/s")}
    assert configuration(said).options.durable == Path("/s/durable")
    file = str(write(tmp_path / "postcopyd.toml", 'durable-dir = "/file"\n'))
    assert configuration(said, file).options.durable == Path("/file")


def test_every_option_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is checked is printed as a file that says the same, each line with its origin."""
    words = {
        "control": "/c", "listen": "[::1]:7", "state-dir": "/s", "durable-dir": "/d", "tls": "off",
        "tls-dir": "/t", "hooks-dir": "/h", "bandwidth": "1.5K", "host-bandwidth": "2K",
        "connections": "3", "max-vms": "4", "max-arrivals": "5", "max-arriving-memory": "6K",
        "max-peers": "7", "metrics": "[::1]:9", "libvirt": "off",
    }  # fmt: skip
    assert words.keys() == KEYS.keys()
    said = [word for name, value in words.items() for word in (f"--{name}", value)]
    said += ["--peer", "host2=10.0.0.2,may=send+control", "--peer", "host3"]
    assert main(["serve", "--check-config", *said]) == 0
    printed = capsys.readouterr().out
    assert printed.endswith("# good\n")
    assert len(re.findall("# command line", printed)) == len(words) + 2
    file = write(tmp_path / "same.toml", printed)
    options = configuration({}, str(file)).options
    assert options == ServeOptions(
        "/c", Address("::1", 7), Path("/s"), "off", Path("/t"), Path("/h"), 1536, 3, Path("/d"),
        2048, 4, 5, 6144, 7, "[::1]:9", "off",
        (Peer("host2", Address("10.0.0.2", 16525), frozenset({"send", "control"})), Peer("host3")),
    )  # fmt: skip
    assert main(["serve", "--check-config", "--config", str(file)]) == 0
    assert f'tls = "off"                                      # {file}, line 5\n' in (
        capsys.readouterr().out
    )


def test_check_refuses(
    tmp_path: Path, folders: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """A bad configuration is a usage error, checked or served, with every mistake on a line."""
    file = write(folders[1] / "postcopyd.toml", "max-vms = 0\ntls = 1\n")
    drop = write(folders[0] / "postcopyd.toml.d/1.toml", "x = 1\n")
    for check in (["--check-config"], []):
        assert main(["serve", *check]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        lines = [f"postcopyd: {file}, line 1: ", f"{file}, line 2: ", f"{drop}, line 1: "]
        assert all(line.startswith(one) for line, one in zip(err.splitlines(), lines, strict=True))


def test_which_libvirt() -> None:
    """Who may send domains is as good as root: where nobody shows who it is, one is named."""
    for tls, libvirt, uri in (
        ("require", None, "qemu:///system"),
        ("require", "off", ""),
        ("require", "qemu:///session", "qemu:///session"),
        ("off", None, ""),
        ("off", "qemu:///system", "qemu:///system"),
    ):
        assert ServeOptions(tls=tls, libvirt=libvirt).libvirt_uri == uri


def test_the_example() -> None:
    """It has every key with its default, and says nothing as long as all is commented out."""
    text = EXAMPLE.read_text()
    assert configuration({}, str(EXAMPLE)).options == ServeOptions()
    settings = re.findall(r"^#([a-z-]+) = ", text, re.MULTILINE)
    assert settings == [*KEYS, *PEER_KEYS]
    top, _, peers = text.partition("#[peers.")
    said = re.sub(r"(?m)^#(?=[a-z-]+ = )", "", top)
    folder = EXAMPLE.parent
    defaults = ServeOptions(durable_dir=Path("/var/lib/postcopyd"), libvirt="qemu:///system")
    assert from_text(said, folder) == defaults
    both = from_text(re.sub(r"(?m)^#(?=[a-z-]+ = |\[)", "", f"#[peers.{peers}"), folder).peers
    assert [peer.name for peer in both] == ["host2"]
    assert both[0].may == frozenset({"send", "receive", "control"})


def from_text(text: str, folder: Path) -> ServeOptions:
    said: dict[Any, Any] = {}
    wrong: list[str] = []
    files.take_text(text, folder / "example", said, wrong)
    assert wrong == []
    return files.put_together(said)


# --- mistakes ------------------------------------------------------------------------------------

MISTAKES = [
    ('\nlistn = "x"', 'line 2: unknown key "listn"; did you mean listen?; the keys are control,'),
    ('state_dir = "/x"', "did you mean state-dir?"),
    ("zebra = 1", 'line 1: unknown key "zebra"; the keys are control, listen, '),
    ("control = 1", "line 1: control = 1: a path is expected, in quotes"),
    ('control = "run/x"', "an absolute path is expected, beginning with /"),
    ('listen = "a:b"', "cannot read 'a:b' as an address: say HOST or HOST:PORT"),
    ("listen = 16525", "HOST or HOST:PORT is expected, in quotes"),
    ('tls = "requires"', '"require" or "off" is expected; did you mean require?'),
    ("tls = false", '"require" or "off" is expected'),
    ("connections = 0", "connections = 0: a number from 1 to 16 is expected"),
    ("connections = true", "from 1 to 16"),
    ('connections = "4"', "from 1 to 16"),
    ("max-vms = 1.5", 'a number from 1 to 100000 is expected; or "none"'),
    ("max-peers = 1", "a number from 2 to"),
    ("bandwidth = -1", "bandwidth = -1: cannot read '-1' as a size"),
    ("bandwidth = 1e9", 'a whole number of bytes is expected, or one with K, M or G like "1.5G"'),
    ('host-bandwidth = "1T"', 'like 1.5G; or "none"'),
    ('max-arriving-memory = "0"', "out of range"),
    ("bandwidth = 2020-01-01", "a whole number of bytes"),
    ('metrics = "9000"', "a port is expected"),
    ("[peer.host2]\nmay = []", 'line 1: unknown key "peer"; did you mean peers?'),
    ("[limits]\nmax-vms = 1", 'line 1: unknown key "limits"'),
    ('[peers]\nhost2 = "h"', 'line 2: "host2" is not a table: write [peers."host2"]'),
    ('[peers.h.example.org]\nmay = []', "line 1: [peers.h.example...] is a table within"),
    ('peers = "x"', "peers is written in tables, [peers.NAME]"),
    ('[[peers]]\nname = "x"', "peers is written in tables, [peers.NAME]"),
    ('[peers."a b"]', "line 1: [peers.\"a b\"]: a peer's name is a DNS name"),
    ('[peers.h]\naddress = ":5"', "line 2: address = \":5\": cannot read ':5' as an address"),
    ('[peers.h]\nmay = "send"', 'a list of "send", "receive" and "control" is expected'),
    ('[peers.h]\n\nmay = ["sned"]', "line 3: may = [\"sned\"]: a list of"),
    ('[peers.h]\nbandwidth = "1G"', "move it above the first table"),
    ('[peers.h]\nadress = "x"', 'unknown key "adress"; did you mean address?'),
    ("control =", "line 1, column 10: invalid value"),
    ("\ncontrol = /run/x", 'line 2, column 11: invalid value; text stands in quotes, control = "'),
    ("bandwidth = 1G", 'column 14: expected newline or end of document after a statement; text'),
    ('control "/x"', "line 1, column 9: expected '=' after a key in a key/value pair; a line is"),
    ("max-vms = 1\n\nmax-vms = 2", "line 3: max-vms stands on line 1 already; write it once"),
    ('[peers.a]\n[peers.b]\n["peers".a]', "line 3: peers.a stands on line 1 already"),
    ('control = """\nx', "line 2, column 2: "),
    ("connections = 1" + "0" * 5000, "line "),
    ("connections = " + "[" * 5000, "line "),
]  # fmt: skip


@pytest.mark.parametrize(("content", "says"), MISTAKES)
def test_mistakes(tmp_path: Path, content: str, says: str) -> None:
    """Each is said with its file, its line and what is allowed, and what may have been meant."""
    assert says in mistakes(tmp_path / "bad.toml", content)


def test_no_text(tmp_path: Path) -> None:
    """Bytes that are no text are refused with their line; a folder is no file."""
    file = tmp_path / "bad.toml"
    file.write_bytes(b"max-vms = 1\n# \xff\n")
    with pytest.raises(PostcopydError, match="line 2: this is not UTF-8 text"):
        configuration({}, str(file))
    with pytest.raises(PostcopydError, match="Is a directory"):
        configuration({}, str(tmp_path))


def test_lines(tmp_path: Path) -> None:
    """The line is right behind all that TOML may have before it, in tables and dotted keys too."""
    said = mistakes(
        tmp_path / "bad.toml",
        '# "\n'
        'control = """\n'
        'max-vms = 0 \\""" # ""\n'
        '""" # a comment with "\n'
        "'max-vms' = 0\n"
        '"max\\u002darrivals" = [ # ]\n'
        "  '''\n]''', { a = 1, b = \"}\" },\n"
        "]\n"
        'peers . "a.b" . address = ""\n'
        "[ peers . 'host2' ] # comment\n"
        "\taddress = [\n  1\n]\n"
        "may = 1\n"
        "[peers.c]\r\n"
        'address = {x = "}"}'
    )  # fmt: skip
    assert [line.partition(":")[0] for line in said.splitlines()] == [
        f"line {line}" for line in (2, 5, 6, 10, 12, 15, 17)
    ]
