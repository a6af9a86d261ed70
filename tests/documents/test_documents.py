# SPDX-License-Identifier: Apache-2.0
"""The documents do not rot: what they say to type works, and prints what they say.

docs/FIRST-GUEST.md and docs/LIBVIRT.md want systemd: tests/hosts/test_first_guest.py runs them.
"""

from __future__ import annotations

import io
import re
import shlex
from collections.abc import Iterator
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import console as d
import pytest
from shells import HOME, Host, scp, two_hosts

from postcopyd.cli import main

PAGES = sorted(
    [
        d.ROOT / "README.md",
        d.ROOT / "CONTRIBUTING.md",
        *d.ROOT.glob("docs/*.md"),
        *d.ROOT.glob("examples/*.md"),
    ]
)
# There these words are the first ones of a connection.
COMMANDED = [page for page in PAGES if page.name != "PROTOCOL.md"]
TRIED = {"README.md", "VMM-AUTHORS.md", "FIRST-GUEST.md", "LIBVIRT.md"}


@pytest.fixture
def hosts() -> Iterator[dict[str, d.Run]]:
    with two_hosts() as both:
        yield prompts(both)


def prompts(both: list[Host]) -> dict[str, d.Run]:
    """A prompt without a name is the first host's."""
    roots = {host.name: host.root for host in both}

    def run(host: Host, text: str) -> tuple[int, str]:
        if text.startswith("scp "):
            return scp(text, HOME, host.root, roots)
        status, said = host.shell.run(text)
        if text.startswith("(postcopyd serve "):  # who types the next command takes longer
            log = text.rpartition("2> ")[2].split()[0]
            host.shell.run(f"until grep -qs serving {log}; do sleep 0.05; done", 20)
        return status, said

    for host in both:
        host.shell.run(f"ln -s {d.ROOT}/examples")
    named = {f"{host.name}#": partial(run, host) for host in both}
    return named | {"#": named["host1#"], "$": named["host1#"]}


def test_readme(hosts: dict[str, d.Run]) -> None:
    assert d.run(d.ROOT / "README.md", hosts) > 10


def test_vmm_authors(hosts: dict[str, d.Run]) -> None:
    assert d.run(d.ROOT / "docs/VMM-AUTHORS.md", hosts) > 10


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_is_run(page: Path) -> None:
    """By a test here or by one that is named, or there is a reason beside it."""
    for block in d.blocks(page):
        assert page.name in TRIED or block.not_run, f"{page.name}:{block.line}"


# What stands for something in a sentence: in a command of its own it would be a name.
_CAPITALS = {"HOST": "host", "DIR": "/tmp", "RATE": "1M", "N": "2", "SOCKET": "/tmp/s", "FILE": "f"}


@pytest.mark.parametrize("page", COMMANDED, ids=lambda page: page.name)
def test_every_command_is_known(page: Path) -> None:
    """Also those within sentences, which nobody runs: the command line takes each."""
    for said in re.findall(r"`(postcopyd [a-z][^`]*)`", page.read_text()):
        words = [_CAPITALS.get(word, word) for word in shlex.split(said)[1:]]
        if words[-1:] == ["..."] or len(words) == 1:
            assert words[0] in verbs(), f"{page.name}: {said}"
            continue
        if words[-1].startswith("--") and re.search(f"{words[-1]} [A-Z]", usage(words[0])):
            words.append("/tmp/1")  # a sentence may name an option without its value
        try:
            main.parser().parse_args(words)
        except SystemExit as refused:
            pytest.fail(f"{page.name}: {said}: {refused}")


def usage(verb: str) -> str:
    """The options of a verb, those with a value with its name behind."""
    with pytest.raises(SystemExit), io.StringIO() as said, redirect_stdout(said):
        try:
            main.parser().parse_args([verb, "--help"])
        finally:
            text = said.getvalue()
    return text.partition("\n\n")[0].replace("]", "\n")


def verbs() -> set[str]:
    return set(re.findall(r"^    ([a-z-]+) ", main.parser().format_help(), re.M))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_are_there(page: Path) -> None:
    """Those of this repository that a page names, from its root or from the package's."""
    for name in re.findall(r"`([\w./-]+\.(?:py|[ch]|varlink))`", page.read_text()):
        beside = (
            d.ROOT,
            d.ROOT / "postcopyd",
            d.ROOT / "postcopyd/native",
            d.ROOT / "examples",
            page.parent,
        )
        assert any((folder / name).exists() for folder in beside), f"{page.name}: {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", text):
        assert (page.parent / link).exists(), f"{page.name}: {link}"
    for file, anchor in re.findall(r"\]\(([^)#:]*)#([\w-]+)\)", text):
        target = page.parent / file if file else page
        headings = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
        known = {re.sub(r"[^\w -]", "", one.lower()).replace(" ", "-") for one in headings}
        assert anchor in known, f"{page.name}: {file}#{anchor}"
