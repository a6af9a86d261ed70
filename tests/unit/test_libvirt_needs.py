# SPDX-License-Identifier: Apache-2.0
"""What the XML of a domain says: XML in, sentences out."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from postcopyd.vmm import Disk, DiskFile
from postcopyd.vmm.libvirt import needs


def domain(devices: str = "", more: str = "") -> str:
    return f"<domain type='kvm'><name>web1</name>{more}<devices>{devices}</devices></domain>"


def described(**changes: Any) -> dict[str, Any]:
    plain = {"live": domain(), "libvirt": 9_000_000, "job": False, "snapshots": 0, "checkpoints": 0}
    return plain | changes


DISK = "<disk type='file'><driver name='qemu' type='raw'/><source file='/srv/d'/></disk>"
TAP = "<interface type='network'><source network='default'/><driver name='vhost'/></interface>"


@pytest.mark.parametrize("live", [domain(), domain(DISK + TAP)])
def test_what_moves(live: str) -> None:
    assert needs.refusals("web1", described(live=live)) == []


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({"snapshots": 2}, "2 snapshots"),
        ({"checkpoints": 1}, "1 checkpoints"),
        ({"job": True}, "virsh domjobinfo"),
        ({"libvirt": 8_001_000}, "libvirt 8.1, whose monitor"),
    ],
)
def test_what_libvirt_says_of_it(found: dict[str, Any], said: str) -> None:
    (sentence,) = needs.refusals("web1", described(**found))
    assert sentence.startswith("The domain web1 ") and said in sentence


@pytest.mark.parametrize(
    ("live", "said"),
    [
        (domain(more="<genid>x</genid>"), "<genid>"),
        (domain("<hostdev mode='subsystem' type='pci'/>"), "<hostdev type='pci'>"),
        (domain("<hostdev mode='subsystem' type='mdev'/>"), "<hostdev type='mdev'>"),
        (domain("<interface type='hostdev'/>"), "<interface type='hostdev'>"),
        (domain("<interface type='vhostuser'/>"), "<interface> by vhostuser"),
        (domain("<interface type='vdpa'/>"), "<interface> by vdpa"),
        (domain("<disk type='vhostuser'/>"), "<disk> by vhostuser"),
        (domain("<filesystem><driver type='virtiofs'/></filesystem>"), "<filesystem> by virtiofs"),
        (domain("<video><driver name='vhostuser'/></video>"), "<video> by vhostuser"),
    ],
)
def test_what_its_xml_says_of_it(live: str, said: str) -> None:
    (sentence,) = needs.refusals("web1", described(live=live))
    assert said in sentence and ": " in sentence


def test_what_it_needs() -> None:
    """A network has a bridge, whose name may be another one there."""
    network = "<interface type='network'><source network='lan' bridge='virbr0'/></interface>"
    devices = (
        network * 2 + "<interface type='bridge'><source bridge='br0'/></interface>"
        "<interface type='direct'><source dev='eth0' mode='bridge'/></interface>"
        "<disk type='volume'><source pool='images' volume='web1'/></disk>" + DISK
    )
    xml = domain(devices, "<os><kernel>/vmlinuz</kernel></os>")
    assert needs.needed(ElementTree.fromstring(xml)) == {
        "networks": ["lan"],
        "links": ["br0", "eth0"],
        "volumes": [["images", "web1"]],
        "files": [["kernel", "/vmlinuz"]],
    }


class Libvirt:
    """In place of a connection, with what the tests want."""

    def __init__(self, error: type[Exception]) -> None:
        self.error, self.lacks, self.same = error, False, True
        self.active = {"lan": True, "dmz": False, "images": True}

    def listAllDomains(self) -> list[Any]:
        return []

    def getDomainCapabilities(self, emulator: str, *_: str | None) -> str:
        if "none" in emulator:
            raise self.error("no such machine")
        return ""

    def compareHypervisorCPU(self, *_: Any) -> None:
        if self.lacks:
            raise self.error("no avx512f")

    def compareCPU(self, host: str) -> int:
        assert host == "<cpu/>"
        return 1 if self.same else 2

    def networkLookupByName(self, name: str) -> Any:
        if name not in self.active:
            raise self.error("not found")
        volume = {"storageVolLookupByName": lambda _, volume: self._volume(volume)}
        return type("", (), {"isActive": lambda _: self.active[name], **volume})()

    storagePoolLookupByName = networkLookupByName

    def _volume(self, name: str) -> None:
        if name != "web1":
            raise self.error("no such volume")


@pytest.fixture
def asked(helper: dict[str, Any]) -> Any:
    """What the helper's questions are asked of."""
    made = object.__new__(helper["Asked"])
    made._libvirt = Libvirt(helper["libvirt"].libvirtError)
    return made


def fits(asked: Any, live: str, **changes: Any) -> list[str]:
    plain: dict[str, Any] = {"networks": [], "links": [], "volumes": [], "files": []}
    about = {"name": "web1", "uuid": "u", "live": live, "known": True, "host": ""} | plain
    found: list[str] = asked.fits(**(about | changes))
    return found


CPU = "<cpu mode='custom'><model>qemu64</model></cpu>"
LIVE = domain("<emulator>/usr/bin/qemu</emulator>", f"<os><type machine='q35'/></os>{CPU}")


def test_what_is_there_is_no_problem(asked: Any, tmp_path: Path) -> None:
    wanted = {"networks": ["lan"], "links": ["lo"], "volumes": [["images", "web1"]]}
    assert fits(asked, LIVE, files=[["kernel", str(tmp_path)]], **wanted) == []


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"networks": ["none"]}, "no network none (not found)"),
        ({"networks": ["dmz"]}, "`virsh net-start dmz`"),
        ({"links": ["none0"]}, "the network device none0"),
        ({"volumes": [["none", "web1"]]}, "no storage pool none"),
        ({"volumes": [["dmz", "web1"]]}, "`virsh pool-start dmz`"),
        ({"volumes": [["images", "web2"]]}, "the volume web2 of web1 is not here: no such volume"),
        ({"files": [["loader", "/none"]]}, "the <loader> /none of web1 is not here"),
    ],
)
def test_what_is_not_there_is_named(asked: Any, wanted: dict[str, Any], said: str) -> None:
    (problem,) = fits(asked, LIVE, **wanted)
    assert said in problem


def test_a_machine_that_qemu_has_not(asked: Any) -> None:
    (problem,) = fits(asked, domain("<emulator>/none</emulator>"))
    assert problem == "its machine cannot be had here: no such machine"


def test_a_cpu_that_the_host_lacks(asked: Any) -> None:
    """Unless libvirt at the source finds the same of the host that runs the domain."""
    asked._libvirt.lacks = True
    (problem,) = fits(asked, LIVE)
    assert "lacks a part of the domain's CPU (no avx512f)" in problem
    assert fits(asked, LIVE, known=False) == []


def test_a_cpu_as_the_host_has_it(asked: Any) -> None:
    """libvirt compares no such CPU: both hosts have to have the same."""
    live = LIVE.replace("custom", "host-passthrough")
    asked._libvirt.lacks = True
    assert fits(asked, live, host="<cpu/>") == []
    asked._libvirt.same = False
    (problem,) = fits(asked, live, host="<cpu/>")
    assert "the CPU of its host as it is (host-passthrough)" in problem


def test_disks_have_the_names_of_the_changed_xml() -> None:
    """By what they are in the guest: also what is below an image."""
    one = (
        "<disk type='file'><source file='{0}/top'/><backingStore type='file'>"
        "<source file='{0}/base'/></backingStore><target dev='vda'/></disk>"
        "<disk type='block'><source dev='{0}/lun'/><target dev='vdb'/></disk>"
    )
    files = [DiskFile(f"/a/{name}", "nfs", True, True, {}) for name in ("top", "base", "lun")]
    disks = [Disk("vda", "qcow2", tuple(files[:2])), Disk("vdb", "raw", (files[2],))]
    known = {"live": domain(one.format("/a")), "xml": domain(one.format("/b"))}
    there = needs.moved(disks, known)
    assert [f.path for disk in there for f in disk.files] == ["/b/top", "/b/base", "/b/lun"]
    assert needs.moved(disks, known | {"xml": ""}) == disks
