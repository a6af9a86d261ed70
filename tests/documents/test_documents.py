# SPDX-License-Identifier: Apache-2.0
"""The documents do not rot: what they say to type works, and prints what they say.

docs/FIRST-GUEST.md and docs/LIBVIRT.md want systemd: tests/hosts/test_documents.py runs them.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import documents as d
import pytest
from shells import Host, two_hosts

from postcopyd import cli

PAGES = sorted([d.ROOT / "README.md", *d.ROOT.glob("docs/*.md"), *d.ROOT.glob("examples/*.md")])
TRIED = {"README.md", "VMM-AUTHORS.md", "FIRST-GUEST.md", "LIBVIRT.md"}
NEEDS = {"LIBVIRT.md": "libvirt"}


@pytest.fixture
def hosts() -> Iterator[dict[str, d.Run]]:
    with two_hosts() as both:
        yield prompts(both)


def prompts(both: list[Host]) -> dict[str, d.Run]:
    """A prompt without a name is the first host's."""
    named = {f"{host.name}#": partial(host.shell.run, seconds=60) for host in both}
    for host in both:
        host.shell.run(f"ln -s {d.ROOT}/examples")
    return named | {"#": named["host1#"], "$": named["host1#"]}


def test_readme(hosts: dict[str, d.Run]) -> None:
    assert d.run(d.ROOT / "README.md", hosts) > 10


def test_vmm_authors(hosts: dict[str, d.Run]) -> None:
    assert d.run(d.ROOT / "docs/VMM-AUTHORS.md", hosts) > 10


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_is_run(page: Path) -> None:
    """By a test here or by one that is named, or there is a reason beside it."""
    for block in d.blocks(page):
        tried = page.name in TRIED and block.needs == NEEDS.get(page.name, "")
        assert tried or block.not_run, f"{page.name}:{block.line}"


# What stands for something in a sentence: in a command of its own it would be a name.
_CAPITALS = {"HOST": "host", "DIR": "/tmp", "RATE": "1M", "N": "2", "SOCKET": "/tmp/s", "FILE": "f"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_is_known(page: Path) -> None:
    """Also those within sentences, which nobody runs: the command line takes each."""
    for said in re.findall(r"`(postcopyd [a-z][^`]*)`", page.read_text()):
        words = [_CAPITALS.get(word, word) for word in shlex.split(said)[1:]]
        if words[-1:] == ["..."] or len(words) == 1:
            assert words[0] in verbs(), f"{page.name}: {said}"
            continue
        try:
            cli.parser().parse_args(words)
        except SystemExit as refused:
            pytest.fail(f"{page.name}: {said}: {refused}")


def verbs() -> set[str]:
    return set(re.findall(r"^    ([a-z-]+) ", cli.parser().format_help(), re.M))


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
