# SPDX-License-Identifier: Apache-2.0
"""The program that speaks to libvirt for the daemon: one process for each thing that is asked.

A call to libvirt may take long, or never return, so none is made in the daemon. This is run by a
Python that has libvirt's binding (calls.py), which need not be the daemon's own: it imports nothing
but that and Python's own library. Standard input is a socket to the daemon, and its end is the end
of this process.

  helper.py URI ask               one JSON object in, one out: `Asked` has what may be asked
  helper.py URI monitor NAME      speaks QMP, as QEMU does, by libvirt's monitor of the domain
  helper.py URI restore           has libvirt make a domain, of the XML and the stream that come in

Owns its connection to libvirt. `restore` is in restoring.py.
"""

from __future__ import annotations

import array
import json
import math
import os
import runpy
import select
import socket
import sys
import threading
import time
from contextlib import suppress
from typing import Any
from xml.etree import ElementTree

try:
    import libvirt
    import libvirt_qemu
except ImportError as error:  # its library is not there, say
    os.write(0, json.dumps({"error": f"its binding for Python: {error}"}).encode() + b"\n")
    sys.exit()

WORD_S = 1.0
"""How long libvirt's word of a stop or a run may come after its answer."""

RECONNECT_S = 10.0
"""How long libvirt's daemon may take to be there again."""

ONCE = frozenset({"xen-save-devices-state"})
"""What QEMU may not be told twice: before 10 it aborts when it gives up disks that it has not."""

AS_THE_HOST = ("host-passthrough", "maximum")
"""Modes of a CPU which the host gives as it is. libvirt compares none of them."""

QEMU_GONE = (libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_OPERATION_INVALID)


def connect(uri: str, within: float = RECONNECT_S) -> libvirt.virConnect:
    """Tries for so long, unless the daemon ends meanwhile: nobody would end this process then."""
    daemon = select.poll()
    daemon.register(0, select.POLLRDHUP)
    deadline = time.monotonic() + within
    while True:
        try:
            connection = libvirt.open(uri)
            connection.setKeepAlive(5, 3)
            return connection
        except libvirt.libvirtError:
            if time.monotonic() > deadline:
                raise
            if daemon.poll(100):
                sys.exit()


def run_events() -> None:
    """Connections that are made after this tell of events, and notice that they are lost, by a
    thread of its own."""
    libvirt.virEventRegisterDefaultImpl()

    def turn() -> None:
        while True:
            libvirt.virEventRunDefaultImpl()

    threading.Thread(target=turn, daemon=True).start()


# --- questions -----------------------------------------------------------------------------------


class Asked:
    """What may be asked: each method takes the fields of the question, and returns the answer.
    A question may also say how long libvirt's daemon may take to be there (`connect`)."""

    def __init__(self, uri: str, within: float) -> None:
        self._libvirt = connect(uri, within)

    def running(self) -> Any:
        """The names of the domains that run."""
        active = libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE
        return [domain.name() for domain in self._libvirt.listAllDomains(active)]

    def describe(self, name: str) -> Any:
        """A domain that runs, as another libvirt needs it; and what that would not get. A CPU that
        is not `known` is not what libvirt here takes this host for: it need not elsewhere."""
        domain = self._libvirt.lookupByName(name)
        live = libvirt.VIR_DOMAIN_XML_MIGRATABLE | libvirt.VIR_DOMAIN_XML_SECURE
        kept = libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE
        persistent = bool(domain.isPersistent())
        xml = domain.XMLDesc(live)
        return {
            "live": xml,
            "kept": domain.XMLDesc(kept),
            "persistent": persistent,
            "autostart": persistent and bool(domain.autostart()),
            "known": not self._lacks_cpu(xml),
            "host": self._host() if cpu_of(xml)[0] in AS_THE_HOST else "",
            "libvirt": self._libvirt.getLibVersion(),
            "job": domain.jobInfo()[0] != libvirt.VIR_DOMAIN_JOB_NONE,
            "snapshots": domain.snapshotNum(),
            "checkpoints": len(domain.listAllCheckpoints()),
        }

    def fits(
        self, name: str, uuid: str, live: str, known: bool, host: str, **needed: list[Any]
    ) -> Any:
        """What stands in the way of a domain of this name here: sentences. `known` and `host` are
        `describe`'s, `needed` is needs.py's."""
        problems = self._taken(name, uuid)
        lacking = [f"the <{what}> {path} of {name} is not here" for what, path in needed["files"]
                   if not os.path.exists(path)]  # fmt: skip
        problems += lacking or self._lacks_cpu(live, as_there=known, host=host)
        for link in needed["links"]:
            if not os.path.exists(f"/sys/class/net/{link}"):
                problems.append(f"{name} uses the network device {link}, which is not here")
        for network in needed["networks"]:
            find = self._libvirt.networkLookupByName
            problems += _inactive(f"net-start {network}", f"network {network}", find, network)
        for pool, volume in needed["volumes"]:
            find = self._libvirt.storagePoolLookupByName
            missing = _inactive(f"pool-start {pool}", f"storage pool {pool}", find, pool)
            if not missing:
                try:
                    find(pool).storageVolLookupByName(volume)
                except libvirt.libvirtError as error:
                    missing.append(f"the volume {volume} of {name} is not here: {error}")
            problems += missing
        return problems

    def _lacks_cpu(self, live: str, *, as_there: bool = True, host: str = "") -> list[str]:
        """Why libvirt here cannot give a domain its machine and CPU: sentences. `host` is the CPU
        of the host that it has as it is."""
        mode, cpu, *machine = cpu_of(live)
        try:
            self._libvirt.getDomainCapabilities(*machine)
        except libvirt.libvirtError as error:
            return [f"its machine cannot be had here: {error}"]
        if mode in AS_THE_HOST:
            if host and self._libvirt.compareCPU(host) != libvirt.VIR_CPU_COMPARE_IDENTICAL:
                return [
                    f"the domain has the CPU of its host as it is ({mode}), and this host has "
                    f"another: start it with a CPU that both have (`virsh hypervisor-cpu-baseline`)"
                ]
        elif cpu and as_there:
            fail = libvirt.VIR_CONNECT_COMPARE_CPU_FAIL_INCOMPATIBLE
            try:
                self._libvirt.compareHypervisorCPU(*machine, cpu, fail)
            except libvirt.libvirtError as error:
                if error.get_error_code() == libvirt.VIR_ERR_CPU_INCOMPATIBLE:
                    return [
                        f"this host lacks a part of the domain's CPU ({error}): start it with one "
                        f"that both have (`virsh hypervisor-cpu-baseline`)"
                    ]
        return []

    def _host(self) -> str:
        host = ElementTree.fromstring(self._libvirt.getCapabilities())  # noqa: S314
        cpu = host.find("host/cpu")
        return "" if cpu is None else ElementTree.tostring(cpu, "unicode")

    def _taken(self, name: str, uuid: str) -> list[str]:
        problems = []
        for domain in self._libvirt.listAllDomains():
            same = domain.name() == name
            if same != (domain.UUIDString() == uuid):
                problems.append(
                    f"libvirt here has another domain with that {'name' if same else 'UUID'}, "
                    f"{domain.name()} ({domain.UUIDString()}): rename or undefine it"
                )
            elif same and domain.isActive():
                problems.append(
                    f"the domain {name} runs here already, or waits: see `virsh list` here"
                )
            elif same and domain.hasManagedSaveImage():
                problems.append(
                    f"libvirt here has a managed save image of {name}, from which it would start "
                    f"an old guest: `virsh managedsave-remove {name}` here, if that is not needed"
                )
        return problems

    def keep(self, name: str, xml: str, autostart: bool) -> Any:
        """Makes a domain that runs persistent, with this XML, or without one as it runs."""
        as_it_runs = libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE
        xml = xml or self._libvirt.lookupByName(name).XMLDesc(as_it_runs)
        self._libvirt.defineXML(xml).setAutostart(autostart)

    def define(self, name: str, xml: str) -> Any:
        """Defines a domain, unless there is one of that name."""
        with suppress(libvirt.libvirtError):
            self._libvirt.lookupByName(name)
            return
        self._libvirt.defineXML(xml)

    def forget(self, name: str, pid: int, undefine: bool) -> Any:
        """Ends a domain whose guest has gone, unless another QEMU than `pid` runs it by now, and
        its definition, or at least its autostart. What the guest has kept in its firmware stays, as
        that file may be the guest's elsewhere."""
        try:
            domain = self._libvirt.lookupByName(name)
            if domain.isActive() and process_of(name) != pid:
                return
            if not undefine and domain.isPersistent():
                domain.setAutostart(False)
            elif domain.isPersistent():
                domain.undefineFlags(
                    libvirt.VIR_DOMAIN_UNDEFINE_KEEP_NVRAM
                    | libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
                    | libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA
                )
            if domain.isActive():
                end(domain)
        except libvirt.libvirtError as error:
            if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
                raise


def end(domain: libvirt.virDomain) -> None:
    """Fine if it ends by itself meanwhile."""
    try:
        keep_files(domain)
        domain.destroy()
    except libvirt.libvirtError as error:
        if not ended(domain, error):
            raise


def ended(domain: libvirt.virDomain, error: libvirt.libvirtError) -> bool:
    """Whether the error is that it has: libvirt says the same of what it does not allow."""
    try:
        return error.get_error_code() in QEMU_GONE and not domain.isActive()
    except libvirt.libvirtError as again:
        return bool(again.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN)


def process_of(name: str) -> int:
    try:
        with open(f"/run/libvirt/qemu/{name}.pid") as file:
            return int(file.read())
    except (OSError, ValueError) as error:
        raise RuntimeError(f"which process runs {name} is not known: {error}") from None


def keep_files(domain: libvirt.virDomain) -> None:
    """Other processes may read the guest's memory: QEMU would empty its files at its end, where the
    XML has <discard/>."""
    if "<discard/>" not in domain.XMLDesc():
        return
    where = {"path": "/objects"}
    for each in said(domain, "qom-list", where)["return"]:
        if each["type"] == "child<memory-backend-file>":
            path = f"/objects/{each['name']}"
            about = {"path": path, "property": "discard-data", "value": False}
            if "error" in (answer := said(domain, "qom-set", about)):
                raise RuntimeError(f"QEMU would not keep {path}: {answer['error']['desc']}")


def said(domain: libvirt.virDomain, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """What QEMU answers, by libvirt's monitor."""
    text = json.dumps({"execute": name, "arguments": arguments})
    answer: dict[str, Any] = json.loads(libvirt_qemu.qemuMonitorCommand(domain, text, 0))
    return answer


def _inactive(start: str, what: str, find: Any, name: str) -> list[str]:
    try:
        active = find(name).isActive()
    except libvirt.libvirtError as error:
        return [f"libvirt here has no {what} ({error}): define it as at the source"]
    return [] if active else [f"the {what} of libvirt here is not active: `virsh {start}` here"]


def cpu_of(live: str) -> tuple[str, str, str | None, str | None, str | None, str | None]:
    """The mode of a domain's CPU, its XML, and emulator, architecture, machine and type."""
    domain = ElementTree.fromstring(live)  # noqa: S314 (the daemon has read it)
    cpu, os_type = domain.find("cpu"), domain.find("os/type")
    machine = {} if os_type is None else os_type.attrib
    return (
        "" if cpu is None else cpu.get("mode", "custom"),
        "" if cpu is None else ElementTree.tostring(cpu, "unicode"),
        domain.findtext("devices/emulator"),
        machine.get("arch"),
        machine.get("machine"),
        domain.get("type"),
    )


def ask(uri: str, channel: socket.socket) -> None:
    with channel.makefile("rb") as lines:
        question = json.loads(lines.readline())
    answer: dict[str, Any]
    try:
        asked = Asked(uri, question.pop("connect", RECONNECT_S))
        answer = {"return": getattr(asked, question.pop("ask"))(**question)}
    except (libvirt.libvirtError, RuntimeError) as error:
        answer = {"error": str(error)}
    channel.sendall(json.dumps(answer).encode() + b"\n")


# --- a monitor -----------------------------------------------------------------------------------


class Monitor:
    """Says to libvirt what the daemon says to QEMU, and to the daemon what QEMU says.

    `stop` and `cont` are libvirt's own calls: so it knows who stops the guest, and takes its locks.
    They are answered after QEMU's event about them, as QEMU itself does.
    """

    def __init__(self, uri: str, name: str, channel: socket.socket) -> None:
        self._uri, self._name, self._channel = uri, name, channel
        self._writing = threading.Lock()
        self._heard = threading.Condition()
        self._counts = {"STOP": 0, "RESUME": 0}
        self._open(math.inf)

    def _open(self, within: float = RECONNECT_S) -> None:
        self._libvirt = connect(self._uri, within)
        self._domain = self._libvirt.lookupByName(self._name)
        libvirt_qemu.qemuMonitorEventRegister(self._libvirt, self._domain, None, self._event, None)

    def serve(self) -> None:
        number = self._libvirt.getVersion()  # the domain's own is asked once it can be
        version = {"major": number // 10**6, "minor": number // 1000 % 1000, "micro": number % 1000}
        self._say({"QMP": {"version": {"qemu": version, "package": ""}, "capabilities": []}})
        given: list[int] = []
        buffer = b""
        while True:
            room = socket.CMSG_SPACE(4 * 4)
            data, about, _, _ = self._channel.recvmsg(1 << 16, room, socket.MSG_CMSG_CLOEXEC)
            for level, kind, value in about:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    given += array.array("i", value)
            if not data:
                return
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                self._take(json.loads(line), given)

    def _take(self, command: dict[str, Any], given: list[int]) -> None:
        number, name = command.pop("id", None), command["execute"]
        lent = [given.pop(0)] if name in ("getfd", "add-fd") and given else []
        try:
            answer = self._tried(command, lent)
        except libvirt.libvirtError as error:
            if ended(self._domain, error):
                sys.exit()  # as QEMU's own monitor ends with QEMU
            answer = {"error": {"class": "GenericError", "desc": str(error)}}
        finally:
            for fd in lent:
                os.close(fd)
        self._say({**{k: answer[k] for k in ("return", "error") if k in answer}, "id": number})

    def _tried(self, command: dict[str, Any], lent: list[int]) -> dict[str, Any]:
        """Once more if libvirt's daemon went away: QEMU may have heard it, and nearly all that is
        said here may be said twice. What may not fails, so that the guest is rolled back."""
        try:
            return self._done(command, lent)
        except libvirt.libvirtError:
            if self._libvirt.isAlive() or command["execute"] in ONCE:
                raise
        self._open()
        return self._done(command, lent)

    def _done(self, command: dict[str, Any], lent: list[int]) -> dict[str, Any]:
        name = command["execute"]
        if name == "qmp_capabilities":
            return {"return": {}}
        if name in ("stop", "cont") and self._turned(name):
            return {"return": {}}
        text = json.dumps(command)
        if lent:
            said, _ = libvirt_qemu.qemuMonitorCommandWithFiles(self._domain, text, lent, 0)
        else:
            said = libvirt_qemu.qemuMonitorCommand(self._domain, text, 0)
        answer: dict[str, Any] = json.loads(said)
        return answer

    def _turned(self, name: str) -> bool:
        """Has libvirt stop or run the guest. Returns whether libvirt takes it for one that can be:
        QEMU is told itself what to do with others (one that sleeps)."""
        state, turn, event = {
            "stop": (libvirt.VIR_DOMAIN_RUNNING, self._domain.suspend, "STOP"),
            "cont": (libvirt.VIR_DOMAIN_PAUSED, self._domain.resume, "RESUME"),
        }[name]
        if self._domain.state()[0] != state:
            return False
        with self._heard:
            seen = self._counts[event]
        turn()
        with self._heard:
            self._heard.wait_for(lambda: self._counts[event] > seen, WORD_S)
        return True

    def _event(
        self, _c: Any, _d: Any, event: str, seconds: int, micros: int, details: str, _o: Any
    ) -> None:
        stamp = {"seconds": seconds, "microseconds": micros}
        self._say({"event": event, "data": json.loads(details or "{}"), "timestamp": stamp})
        with self._heard:
            if event in self._counts:
                self._counts[event] += 1
                self._heard.notify_all()

    def _say(self, message: dict[str, Any]) -> None:
        with self._writing:
            self._channel.sendall(json.dumps(message).encode() + b"\n")


def main() -> None:
    libvirt.registerErrorHandler(lambda _context, _error: None, None)
    _, uri, what, *rest = sys.argv
    channel = socket.socket(fileno=os.dup(0))
    run_events()
    if what == "ask":
        ask(uri, channel)
    elif what == "monitor":
        Monitor(uri, rest[0], channel).serve()
    else:
        restoring = runpy.run_path(os.path.join(os.path.dirname(__file__), "restoring.py"))
        restoring["Restore"](connect(uri), channel).serve()


if __name__ == "__main__":
    main()
