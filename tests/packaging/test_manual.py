# SPDX-License-Identifier: Apache-2.0
"""The man pages say everything, and nothing that is not so; and shell completion completes."""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from needs import missing

import postcopyd
from postcopyd.cli import main, verbs
from postcopyd.config import options as config
from postcopyd.records import store
from postcopyd.varlink import idl

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "man").glob("*.rst"))
COMMAND = (ROOT / "man/postcopyd.1.rst").read_text()
SETTINGS = (ROOT / "man/postcopyd.toml.5.rst").read_text()


def sections(page: str, underline: str) -> dict[str, str]:
    """What stands below each heading of one level, and above the next of any."""
    heads = re.compile(r"^(\S[^\n]*)\n([=-])\2{2,}\n(.*?)(?=^\S[^\n]*\n[=-]{3,}\n|\Z)", re.M | re.S)
    return {one[1]: one[3] for one in heads.finditer(page) if one[2] == underline}


def terms(text: str) -> set[str]:
    """The bold words of a definition list's terms."""
    lines = re.findall(r"^(\*\*.*)\n +\S", text, re.M)
    return set(re.findall(r"\*\*(.+?)\*\*", "\n".join(lines)))


def commands() -> dict[str, argparse.ArgumentParser]:
    """What --help shows: `keeper` is for a unit."""
    [verbs] = [a for a in main.parser()._actions if isinstance(a, argparse._SubParsersAction)]
    shown = [action.dest for action in verbs._choices_actions]
    assert set(verbs.choices) - set(shown) == {"keeper"}
    return {verb: verbs.choices[verb] for verb in shown}


@pytest.mark.parametrize("verb", commands())
def test_every_option_is_in_the_manual(verb: str) -> None:
    """postcopyd(1) has a section for each verb, with all of its options and no others."""
    [told] = [text for head, text in sections(COMMAND, "-").items() if head.split()[0] == verb]
    options = {word for a in commands()[verb]._actions for word in a.option_strings if word != "-h"}
    everywhere = terms(sections(COMMAND, "=")["VERBS"]) | {"--help"}
    assert everywhere == {"--help", "--control", "--json"}
    if verb != "serve":
        options -= everywhere
    assert terms(told) == options - {"--help"}
    assert f"**postcopyd {verb}**" in sections(COMMAND, "=")["SYNOPSIS"]


def test_every_key_is_in_the_manual() -> None:
    """postcopyd.toml(5) has the keys of the configuration, what they take, and their defaults."""
    told = sections(SETTINGS, "=")
    assert terms(told["KEYS"]) == set(config.KEYS)
    assert terms(told["PEERS"]) - {"[peers.", "]"} == set(config.PEER_KEYS)
    plain = SETTINGS.replace("\\ ", "").replace("\\", "").replace("*", "")
    for name, key in {**config.KEYS, **config.PEER_KEYS}.items():
        assert f"\n{name} = {key.metavar}\n" in plain
    shipped = (ROOT / "systemd/postcopyd.toml").read_text().partition("[peers.")[0]
    defaults = re.findall(r"^#([a-z-]+) = (.*)$", shipped, re.M)
    assert [name for name, _ in defaults] == list(config.KEYS)
    for name, default in defaults:
        [about] = re.findall(rf"^{name} = .*\n    (.*)", plain, re.M)
        assert f"Default: {default.replace('*', '')}" in about


def test_every_field_is_in_the_manual() -> None:
    """postcopyd(1) names every field of the result and of the state of a VM."""
    text = (
        Path(postcopyd.__file__).with_name("control").joinpath("io.postcopyd.varlink").read_text()
    )
    types = idl.parse_interface(text).types
    told = {
        head: re.findall(r"\*\*(\w+)\*\*", text) for head, text in sections(COMMAND, "-").items()
    }
    heads = {"VmStatus": "The state of a VM", "Found": "What was found", "Ram": "What was found"}
    for name, type_ in types.items():
        assert set(type_.fields) <= set(told[heads.get(name, "The result")])


def test_every_exit_status_is_in_the_manual() -> None:
    """postcopyd(1) has the statuses that the verbs end with, and no others."""
    statuses = {
        verbs.DONE,
        verbs.FAILED,
        verbs.USAGE,
        verbs.WAITS,
        verbs.CRASHED,
        verbs.INTERRUPTED,
    }
    assert terms(sections(COMMAND, "=")["EXIT STATUS"]) == {str(status) for status in statuses}


def test_every_variable_is_in_the_manual() -> None:
    """postcopyd(1) has every environment variable of our own that the code looks at."""
    code = "".join(file.read_text() for file in (ROOT / "postcopyd").rglob("*.py"))
    told = terms(sections(COMMAND, "=")["ENVIRONMENT"])
    assert told == set(re.findall(r"\bPOSTCOPYD_[A-Z_]+\b", code))


def test_the_folders_in_the_manual_are_the_defaults() -> None:
    """FILES of postcopyd(1) has the places that are used when nothing else is said."""
    files = sections(COMMAND, "=")["FILES"]
    for path in (config.DEFAULT_CONTROL, config.DEFAULT_STATE_DIR, config.DEFAULT_DURABLE_DIR):
        assert f"\n*{path}*\n" in files
    assert str(config.DEFAULT_PORT) in COMMAND
    assert store.VERSION == 1, (
        "a new version of the records: say in UPGRADE what becomes of old ones"
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_is_well_formed(page: Path, tmp_path: Path) -> None:
    """groff has nothing to warn of, and every page that is pointed to is one of ours or known."""
    if not shutil.which("groff"):
        missing("groff")
    roff = tmp_path / page.stem
    subprocess.run(
        [Path(sys.executable).with_name("rst2man"), "--strict", page, roff], check=True, timeout=60
    )
    done = subprocess.run(
        ["groff", "-man", "-t", "-ww", "-k", "-Tutf8", roff], capture_output=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, b"")
    ours = {f"{name.stem.rpartition('.')[0]}({name.stem[-1]})" for name in PAGES}
    pointed = set(re.findall(r"\*\*(postcopyd[\w.-]*)\*\*\\ (\(\d\))", page.read_text()))
    assert {"".join(one) for one in pointed} <= ours


def test_bash_completes_verbs_names_and_values(tmp_path: Path) -> None:
    """Verbs, the names of attached VMs, options and their values; names are no shell code."""
    subprocess.run(
        [sys.executable, ROOT / "tools/completions.py", tmp_path], check=True, timeout=60
    )
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin/postcopyd"
    program.write_text("""#!/bin/sh
echo '{"vm":"web1","phase":"drained","result":{"event":"completed","vm":"web1"}}'
echo '{"vm":"web2","phase":"idle"}'
echo '{"vm":"$(touch pwned)","phase":"idle"}'
""")
    program.chmod(0o755)
    script = f"""
source {tmp_path}/postcopyd
for line in "$@"; do
  read -ra COMP_WORDS <<<"$line"
  COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 ))
  _shtab_postcopyd
  echo "${{COMPREPLY[*]}}"
done
"""
    wanted = {
        "postcopyd mi": "migrate",
        "postcopyd migrate w": "web1 web2",
        "postcopyd migrate web1 --mode p": "postcopy precopy",
        "postcopyd resolve web1 --p": "--poison",
        "postcopyd attach w": "",
        "postcopyd serve --tls r": "require",
    }
    done = subprocess.run(
        ["bash", "-c", script, "bash", *wanted],
        env={"PATH": f"{tmp_path}/bin:/usr/bin:/bin"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.stdout.splitlines(), done.stderr) == ([*wanted.values()], "")
    assert not (tmp_path / "pwned").exists()
