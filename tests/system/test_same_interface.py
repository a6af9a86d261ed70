# SPDX-License-Identifier: Apache-2.0
"""What people and programs have written for the version before this one works with this one: its
command line, its configuration, its Varlink interface."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from before import NEW, OLD, needed, told
from qemu_lab import Lab

from postcopyd.control.methods import interface
from postcopyd.varlink.idl import Enum, Maybe, Struct, Type, parse_interface
from postcopyd.vmm.qemu.blocks import DEVICE_STATE

pytestmark = pytest.mark.long

# Verb by verb, what argparse takes.
COMMAND_LINE = """
import argparse, json
from MODULE import parser

def taken(parser):
    return {
        " ".join(action.option_strings) or action.dest: {
            "takes": type(action).__name__,
            "nargs": action.nargs,
            "choices": list(action.choices or ()),
            "required": action.required,
            "default": action.default,
        }
        for action in parser._actions
        if not isinstance(action, argparse._SubParsersAction)
    }

top = parser()
(verbs,) = (a.choices for a in top._actions if isinstance(a, argparse._SubParsersAction))
print(json.dumps({"": taken(top), **{verb: taken(made) for verb, made in verbs.items()}}))
"""

CONFIGURATION = """
listen = "192.0.2.1:16525"
tls-dir = "/etc/pki/postcopyd"
max-arrivals = 3
host-bandwidth = "1G"
[peers."host2.example"]
address = "192.0.2.2"
may = ["send", "receive"]
"""


@pytest.fixture(autouse=True)
def both() -> None:
    needed()


def test_command_line() -> None:
    """Every verb and option is there, takes what it took, and what need not be said need not be."""
    before = told(OLD, COMMAND_LINE.replace("MODULE", "postcopyd.cli"))
    now = told(NEW, COMMAND_LINE.replace("MODULE", "postcopyd.cli.main"))
    assert len(before) > 10
    for verb, options in before.items():
        for option, was in options.items():
            taken = now[verb][option]
            assert set(was.pop("choices")) <= set(taken.pop("choices")), (verb, option)
            assert taken == was, (verb, option)
        assert not [
            option
            for option, added in now[verb].items()
            if option not in options and added["required"]
        ], verb


def test_configuration(tmp_path: Path) -> None:
    """A file says what it said."""
    file = tmp_path / "postcopyd.toml"
    file.write_text(CONFIGURATION)
    command = [sys.executable, "-m", "postcopyd", "serve", "--check-config", "--config", str(file)]
    before, now = (
        subprocess.run(command, cwd=site, capture_output=True, text=True, check=True).stdout
        for site in (OLD, NEW)
    )
    assert set(before.splitlines()) <= set(now.splitlines())


def grown(was: Type, now: Type, *, asked: bool) -> None:
    """The same type, but for more names of an enumeration and more fields. Who asks has to say
    nothing more than before, and may have to say less."""
    if isinstance(now, Maybe) and (asked or isinstance(was, Maybe)):
        grown(was.of if isinstance(was, Maybe) else was, now.of, asked=asked)
    elif isinstance(was, Enum) and isinstance(now, Enum):
        assert set(was.names) <= set(now.names)
    elif isinstance(was, Struct) and isinstance(now, Struct):
        for name, kind in was.fields.items():
            grown(kind, now.fields[name], asked=asked)
        added = now.fields.keys() - was.fields.keys()
        assert not asked or all(isinstance(now.fields[name], Maybe) for name in added)
    else:
        assert was == now


def test_varlink_interface() -> None:
    """Every method, type and error, and every field of them."""
    was = parse_interface((OLD / "postcopyd/io.postcopyd.varlink").read_text())
    now = interface()
    assert was.name == now.name
    for name, method in was.methods.items():
        grown(method.input, now.methods[name].input, asked=True)
        grown(method.output, now.methods[name].output, asked=False)
    members: list[tuple[Any, Any]] = [(was.types, now.types), (was.errors, now.errors)]
    for before, there in members:
        for name, kind in before.items():
            grown(kind, there[name], asked=False)


# What must be equal on both hosts, by the driver of QEMU.
FACTS = """
import json, trio
from MODULE import QemuVmm

async def facts():
    driver = await QemuVmm.connect("web1", "SOCKET")
    shape = await driver.inspect("source")
    return shape.facts

print(json.dumps(trio.run(facts)))
"""

EVERYTHING = """
-smp 2,maxcpus=4 -rtc base=utc
-drive if=none,id=d0,file=DISK,format=raw -device virtio-blk-pci,drive=d0,id=disk0
-device virtio-scsi-pci,id=scsi0 -drive if=none,id=d1,file=null-co://,format=raw
-device scsi-hd,drive=d1,bus=scsi0.0 -netdev user,id=n0 -device virtio-net-pci,netdev=n0
-device qemu-xhci,id=usb -device usb-tablet,bus=usb.0,id=tablet -device VGA
-device virtio-serial-pci -chardev null,id=c0 -device virtserialport,chardev=c0,name=org.port
-device virtio-rng-pci -device virtio-balloon-pci -serial null
"""


async def test_facts_of_a_qemu(lab: Lab, qemu: int) -> None:
    """Both versions tell the same of a QEMU, but for what tells them apart: they save its device
    state in two ways, and refuse each other's guests."""
    image = lab.folder / "disk"
    image.write_bytes(bytes(1 << 20))
    options = EVERYTHING.replace("DISK", str(image)).split()
    machine = lab.start(qemu, *options)
    await machine.answers()
    script = FACTS.replace("SOCKET", machine.socket)
    before = told(OLD, script.replace("MODULE", "postcopyd.vmm.qemu"))
    now = told(NEW, script.replace("MODULE", "postcopyd.vmm.qemu.driver"))
    new = {key for key in now if key == DEVICE_STATE or key.startswith("memory '")}
    assert len(before) > 12
    assert before == {key: value for key, value in now.items() if key not in new}
    assert DEVICE_STATE in new
