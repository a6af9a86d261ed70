# SPDX-License-Identifier: Apache-2.0
"""How a domain of libvirt is ended whose guest runs elsewhere: the right one, in order."""

from __future__ import annotations

import json
from typing import Any

import pytest

FLAGS = ("KEEP_NVRAM", "SNAPSHOTS_METADATA", "CHECKPOINTS_METADATA")


class Domain:
    """One domain, as libvirt's binding has it; `did` is what was done to it."""

    def __init__(self, xml: str = "<domain/>", pid: int = 7, *, active: bool = True) -> None:
        self.xml, self.pid, self.active = xml, pid, active
        self.did: list[str] = []
        self.refuses = False
        self.raises: dict[str, Exception] = {}
        self.ends = False  # by itself, as it is told to

    def isActive(self) -> bool:
        return self.active

    def isPersistent(self) -> bool:
        return True

    def XMLDesc(self) -> str:
        return self.xml

    def undefineFlags(self, flags: int) -> None:
        self._may("undefine")

    def setAutostart(self, on: bool) -> None:
        self.did.append(f"autostart {on}")

    def destroy(self) -> None:
        self._may("destroy")

    def _may(self, what: str) -> None:
        if what in self.raises:
            self.active = not self.ends
            raise self.raises[what]
        self.did.append(what)

    def say(self, _domain: Any, text: str, _flags: int) -> str:
        said = json.loads(text)
        if said["execute"] == "qom-list":
            kinds = ("memory-backend-file", "memory-backend-ram")
            return json.dumps({"return": [{"name": k, "type": f"child<{k}>"} for k in kinds]})
        self.did.append(f"{said['arguments']['path']} {said['arguments']['value']}")
        return json.dumps({"error": {"desc": "no"}} if self.refuses else {"return": {}})


def forget(
    helper: dict[str, Any], domain: Domain, pid: int = 7, *, undefine: bool = True
) -> list[str]:
    asked = object.__new__(helper["Asked"])
    asked._libvirt = type("", (), {"lookupByName": lambda _, name: domain})()
    names = asked.forget.__globals__
    for flag in FLAGS:
        setattr(names["libvirt"], f"VIR_DOMAIN_UNDEFINE_{flag}", 1)
    names["libvirt_qemu"].qemuMonitorCommand = domain.say
    names["process_of"] = lambda name: domain.pid
    asked.forget("web1", pid, undefine=undefine)
    return domain.did


def test_the_definition_goes_first(helper: dict[str, Any]) -> None:
    """Whatever ends libvirt's daemon in between, nothing is left to be started."""
    assert forget(helper, Domain()) == ["undefine", "destroy"]
    assert forget(helper, Domain(active=False)) == ["undefine"]
    assert forget(helper, Domain(), undefine=False) == ["autostart False", "destroy"]


def test_another_qemu_of_that_name_is_left_alone(helper: dict[str, Any]) -> None:
    """Somebody has started the domain since, with another QEMU."""
    assert forget(helper, Domain(pid=8)) == []


def test_what_other_processes_read_is_not_emptied(helper: dict[str, Any]) -> None:
    """QEMU would do so at its end; if it would not be told, it does not end."""
    xml = "<domain><memoryBacking><discard/></memoryBacking></domain>"
    kept = "/objects/memory-backend-file False"
    assert forget(helper, Domain(xml)) == ["undefine", kept, "destroy"]
    refusing = Domain(xml)
    refusing.refuses = True
    with pytest.raises(RuntimeError, match="would not keep"):
        forget(helper, refusing)
    assert "destroy" not in refusing.did


@pytest.mark.parametrize("what", ["undefine", "destroy"])
def test_what_libvirt_does_not_allow_is_told(helper: dict[str, Any], what: str) -> None:
    """It has the same code as the end of a domain that ends by itself meanwhile."""
    names = helper["Asked"].forget.__globals__
    invalid = type(
        "invalid",
        (names["libvirt"].libvirtError,),
        {"get_error_code": lambda _: names["libvirt"].VIR_ERR_OPERATION_INVALID},
    )
    domain = Domain()
    domain.raises[what] = invalid("not now")
    with pytest.raises(invalid):
        forget(helper, domain)
    domain.ends = True
    if what == "destroy":
        assert forget(helper, domain) == ["undefine", "undefine"]
    else:  # its definition is there still
        with pytest.raises(invalid):
            forget(helper, domain)
