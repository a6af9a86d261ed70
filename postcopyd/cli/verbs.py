# SPDX-License-Identifier: Apache-2.0
"""The verbs that ask a running daemon: what each asks, what it prints, its exit status.

Owns what an operator is told when the daemon refuses, is not there or goes away, and the choice
between exit statuses 1 and 3. Knows of the daemon only what its interface file says.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from postcopyd.cli import progress
from postcopyd.config import options
from postcopyd.errors import PostcopydError
from postcopyd.varlink.client import (
    CALL_SECONDS,
    Client,
    ConnectionLost,
    ErrorReply,
    NoAnswer,
    Silent,
)

DONE, FAILED, USAGE, WAITS = 0, 1, 2, 3
# EX_SOFTWARE of sysexits.h, for a daemon that ends by a bug: its unit starts it again at once.
CRASHED = 70
# The shell's status of a command that SIGINT ended.
INTERRUPTED = 130

INTERFACE = "io.postcopyd"
# How long a daemon may take to answer a client's first call, which takes it milliseconds. An HA
# manager that asks `may-run` waits less: the records and the disk answer as well.
GREETING_SECONDS = 10.0
MAY_RUN_SECONDS = 4.0
# Where the folders of domains are that are being made, and how much of an XML is read.
MAKING = "/run/postcopyd"
MOST_XML = 10 << 20
# A guest last seen in one of these phases may have left the source for good. In handover it may
# not have; but a script that is told so wrongly would run it twice.
_MAYBE_THERE = frozenset({"handover", "postcopy", "paused", "drained"})


def say(sentence: str, status: int) -> int:
    """Prints the sentence for the operator; returns the exit status."""
    print(f"postcopyd: {sentence}", file=sys.stderr, flush=True)
    return status


class Failed(Exception):
    """One sentence for the operator, and the exit status."""

    def __init__(self, sentence: str, status: int = FAILED) -> None:
        super().__init__(sentence)
        self.status = status


class _NotRunning(Failed):
    """No daemon listens at the control socket, or none answers: a service manager may hold the
    socket while the service does not start."""


def _control(args: argparse.Namespace) -> str:
    return args.control or os.environ.get("POSTCOPYD_CONTROL") or options.DEFAULT_CONTROL


def _again(args: argparse.Namespace, verb: str) -> str:
    """The command to type next, for the same daemon."""
    control = f" --control {shlex.quote(args.control)}" if args.control else ""
    return f"`postcopyd {verb} {shlex.quote(args.name)}{control}`"


def _connect(args: argparse.Namespace, within: float | None = None) -> Client:
    """A connection to a daemon that has answered."""
    path = _control(args)
    try:
        client = Client(path)
    except NoAnswer as error:
        if isinstance(error.__cause__, PermissionError):
            why = "run this as root or as a member of the group postcopyd"
            raise Failed(f"not allowed to speak to the daemon on {path} ({error}): {why}") from None
        start = f"start it with `postcopyd serve --control {path}`"
        absent = isinstance(error.__cause__, FileNotFoundError | ConnectionRefusedError)
        failed = _NotRunning if absent else Failed
        raise failed(f"no daemon answers on {path} ({error}): {start}") from None
    try:
        client.alive(within or GREETING_SECONDS)
    except BaseException as error:
        client.close()
        if isinstance(error, NoAnswer):
            raise _NotRunning(
                f"the daemon on {path} does not answer ({error}), and nothing was asked of it: it "
                f"does not start, or hangs, see `systemctl status postcopyd.service` and its log"
            ) from None
        if isinstance(error, ErrorReply):
            raise _refused(error) from None
        if isinstance(error, ConnectionLost):
            raise _closed(path, "a client") from None
        raise
    return client


def _closed(path: str, what: str) -> Failed:
    return Failed(
        f"the daemon on {path} closed the connection and did not answer {what}: it ended, or has "
        "too many clients; see its log, then ask again"
    )


def _refused(error: ErrorReply) -> Failed:
    name = error.name.removeprefix(f"{INTERFACE}.")
    sentence = error.parameters.get("message")
    if not sentence:
        detail = "".join(f" {value}" for value in error.parameters.values())
        sentence = (
            f"the daemon answered {name}{detail}: it may have another version than this command"
        )
    return Failed(sentence, USAGE if name == "InvalidRequest" else FAILED)


def _call(client: Client, args: argparse.Namespace, method: str, **parameters: Any) -> Any:
    try:
        return client.call(f"{INTERFACE}.{method}", **parameters)
    except ErrorReply as error:
        raise _refused(error) from None
    except Silent:
        raise Failed(
            f"the daemon on {_control(args)} has not answered {method} for {CALL_SECONDS:.0f} s, "
            f"and may still do what was asked: see its log, and `postcopyd list`"
        ) from None
    except ConnectionLost:
        raise _closed(_control(args), method) from None


def _ask(args: argparse.Namespace, method: str, **parameters: Any) -> Any:
    with _connect(args) as client:
        return _call(client, args, method, **parameters)


def _tell(args: argparse.Namespace, event: str, sentence: str) -> int:
    if args.json:
        progress.emit({"event": event, "vm": args.name})
    else:
        print(f"{args.name}: {sentence}", flush=True)
    return DONE


def attach(args: argparse.Namespace) -> int:
    driver = "libvirt" if args.libvirt else "qemu" if args.qemu else "process"
    # Absolute, as the daemon has another working directory.
    path = None if args.libvirt else os.path.abspath(args.qemu or args.process)
    reply = _ask(args, "Attach", name=args.name, driver=driver, socket=path)
    status = reply["status"]
    if args.json:
        found = {"found": reply["found"]} if "found" in reply else {}
        progress.emit({**status, **found})
    else:
        print(progress.line(status), flush=True)
    return DONE


def detach(args: argparse.Namespace) -> int:
    _ask(args, "Detach", name=args.name)
    return _tell(args, "detached", "detached")


def check(args: argparse.Namespace) -> int:
    reply = _ask(args, "Check", name=args.name, to=str(args.to), unsafe=args.unsafe, xml=_xml(args))
    problems, warnings = reply["problems"], reply.get("warnings", [])
    if args.json:
        progress.emit({"event": "checked", "vm": args.name, "to": str(args.to), **reply})
        return FAILED if problems else DONE
    for sentence in (*progress.found(reply.get("found", {})), *problems, *warnings):
        print(f"{args.name}: {sentence}", flush=True)
    if not problems:
        print(f"{args.name}: nothing stands in the way of a migration to {args.to}", flush=True)
    return FAILED if problems else DONE


def _xml(args: argparse.Namespace) -> str | None:
    """What is in the file that --xml names."""
    if args.xml is None:
        return None
    try:
        return Path(args.xml).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is no text"
        raise Failed(f"reading the XML of {args.name} in {args.xml}: {why}", USAGE) from None


def migrate(args: argparse.Namespace) -> int:
    try:
        with _connect(args) as client:
            started = _call(
                client,
                args,
                "Migrate",
                name=args.name,
                to=str(args.to),
                mode=args.mode,
                bandwidth=args.bandwidth,
                precopyPasses=args.precopy_passes,
                maxDowntimeMs=args.max_downtime,
                keepSource=args.keep_source,
                unsafe=args.unsafe,
                persistent=args.persistent,
                undefineSource=args.undefinesource,
                xml=_xml(args),
            )
            result = _follow(client, args, started["migration"])
    except (Failed, PostcopydError) as failed:
        if args.json:
            progress.emit({"event": "failed", "vm": args.name, "error": str(failed)})
        raise
    if args.json:
        progress.emit(result)
    elif result["event"] == "completed":
        peer = result.get("peer") or str(args.to)
        print(progress.summary(result, peer, progress.screen()), flush=True)
    if result["event"] == "completed":
        return DONE
    if result["event"] == "ended":  # the guest ended there, as was meant: nothing is left to do
        return DONE if args.json else say(result["error"], DONE)
    sentence = result.get("error") or f"the migration of {args.name} ended: {result['event']}"
    if result["event"] == "paused":
        watch, recover = _again(args, "watch"), _again(args, "recover")
        again = f"once it can it goes on by itself: {watch}; {recover} tries at once"
        return say(f"{sentence}; {again}", WAITS)
    return say(sentence, FAILED)  # the guest is at the source, whatever phase was seen before


def _follow(client: Client, args: argparse.Namespace, migration: str) -> dict[str, Any]:
    """The result object of a migration, which says where the guest is."""
    phase, maybe_there = "", False
    try:
        with progress.view(args.json) as view:
            for reply in client.stream(f"{INTERFACE}.Watch", name=args.name):
                status = reply["status"]
                result = status.get("result") or {}
                if status.get("migration") != migration:
                    raise Failed(
                        f"lost sight of migration {migration} of {args.name}: another one, "
                        f"{status.get('migration')}, took its place; see {_again(args, 'status')}",
                        WAITS if phase in _MAYBE_THERE else FAILED,
                    )
                if result.get("migration") == migration:
                    return result
                phase = status["phase"]
                # A handover may still end with the guest at the source; later phases may not.
                maybe_there = maybe_there or phase in _MAYBE_THERE - {"handover"}
                view.show(status)
        raise ConnectionLost
    except (ConnectionLost, ErrorReply) as error:
        what = f"the daemon on {_control(args)} went away"
        if isinstance(error, ErrorReply):
            what = str(_refused(error))
        ask = f"start the daemon again if it ended, then ask {_again(args, 'status')}"
        if phase in _MAYBE_THERE:
            raise Failed(
                f"{what} with {args.name} in phase {phase}, so the guest may be at {args.to}: "
                f"do not start it here; {ask}, and if it is paused {_again(args, 'recover')}",
                WAITS,
            ) from None
        raise Failed(
            f"{what} before the handover of {args.name} was seen, so the guest should be here: "
            f"{ask} to be sure"
        ) from None
    except KeyboardInterrupt:
        follow = f"follow it with {_again(args, 'watch')}"
        off = f"cancel it with {_again(args, 'cancel')}"
        if maybe_there:
            off = "after the handover it cannot be cancelled"
        raise Failed(
            f"the migration of {args.name} goes on in the daemon: {follow}; {off}", INTERRUPTED
        ) from None


def list(args: argparse.Namespace) -> int:
    statuses = _ask(args, "List", domains=True)["vms"]
    if args.json:
        for status in statuses:
            progress.emit(status)
    else:
        print(progress.table(statuses, progress.screen()), flush=True)
    return DONE


def status(args: argparse.Namespace) -> int:
    if args.name:
        statuses = [_ask(args, "Status", name=args.name)["status"]]
    else:
        statuses = _ask(args, "List")["vms"]
    for at, status in enumerate(statuses):
        if args.json:
            progress.emit(status)
        else:
            block = progress.block(status, progress.screen())
            print(("\n" if at else "") + block, flush=True)
    return DONE


def watch(args: argparse.Namespace) -> int:
    ended = None
    with _connect(args) as client, progress.lines() as view:
        try:
            for reply in client.stream(f"{INTERFACE}.Watch", name=args.name):
                status = reply["status"]
                if args.json:
                    progress.emit(status)
                    continue
                view.show(status)
                result = status.get("result") or {}
                if result and result.get("migration") != ended and result["event"] == "completed":
                    peer = status.get("peer") or ""
                    view.say(progress.summary(result, peer, progress.screen()))
                ended = result.get("migration")
        except ErrorReply as error:
            raise _refused(error) from None
        except ConnectionLost:
            pass
    raise Failed(f"the daemon on {_control(args)} went away; its migrations wait for it")


def cancel(args: argparse.Namespace) -> int:
    _ask(args, "Cancel", name=args.name)
    return _tell(args, "cancelled", "the migration is cancelled, the guest is here as it was")


def recover(args: argparse.Namespace) -> int:
    _ask(args, "Recover", name=args.name, to=str(args.to) if args.to else None)
    return _tell(args, "recovering", f"recovery goes on; follow it with {_again(args, 'watch')}")


def resolve(args: argparse.Namespace) -> int:
    _ask(args, "Resolve", name=args.name, decision=args.decision)
    return _tell(args, "resolved", f"resolved: {args.decision}")


def may_run(args: argparse.Namespace) -> int:
    """Two must agree: the daemon, or its records if none answers; and the intent on disk, which
    outlives the host too."""
    try:
        made = args.domain and _is_made_here(sys.stdin.buffer.read(MOST_XML))
        why = "" if made else _daemon_against(args) or _disk_against(args)
    except (Failed, PostcopydError) as failed:
        why = str(failed)  # what cannot be asked has not agreed
    if args.json:
        progress.emit({"event": "may-run", "vm": args.name, "mayRun": not why, "message": why})
    elif not why:
        print(f"{args.name}: nothing here forbids starting it", flush=True)
    return say(f"do not start {args.name} here: {why}", FAILED) if why else DONE


def _is_made_here(xml: bytes) -> bool:
    """Whether a daemon here has libvirt make just this domain, for a guest that comes here or is
    taken back: it waits for its guest, and runs nothing before that. The domain's XML names a
    folder that nobody else knows, which is locked as long as that takes (vmm/libvirt/restoring.py).
    """
    mark = rb"""<postcopyd:making xmlns:postcopyd=["']urn:postcopyd:making["'] in=["']([\w-]+)"""
    if (found := re.search(mark, xml)) is None:
        return False
    try:
        folder = os.open(os.path.join(MAKING, found[1].decode()), os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return False
    try:
        fcntl.flock(folder, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return os.fstat(folder).st_uid == os.geteuid()
    finally:
        os.close(folder)
    return False


def _daemon_against(args: argparse.Namespace) -> str:
    """Why a guest must not be started here, by what the daemon knows of it; "" if it may."""
    try:
        with _connect(args, MAY_RUN_SECONDS) as client:
            vms = _call(client, args, "List")["vms"]
    except _NotRunning:
        return _record_against(args)
    for status in vms:
        if status["vm"] == args.name and not _stays_here(status):
            return str(status["message"])
    return ""


def _record_against(args: argparse.Namespace) -> str:
    """The same, by the daemon's records: when it is started it goes on with them."""
    from postcopyd.records import store

    record = store.read_record(_state_dir(args), args.name)
    if record is None or _stays_here(record["status"]):
        return ""
    return f"{record['status']['message']}; no daemon answers here: start it, and it goes on"


def _state_dir(args: argparse.Namespace) -> Path:
    """The daemon's folder of records, by what the arguments say of its folders."""
    if args.state_dir:
        return Path(args.state_dir)
    durable = Path(args.durable_dir or options.DEFAULT_DURABLE_DIR)
    return durable.parent if durable.name == "durable" else options.DEFAULT_STATE_DIR


def _stays_here(status: Mapping[str, Any]) -> bool:
    """Whether the guest is not at the other host, nor on its way there or here."""
    result = status.get("result") or {}
    match status["role"], status["phase"]:
        case _, "idle":  # with a migration: one is being prepared
            return not status.get("migration")
        case "source", "failed":  # resolving a migration fails it too, with none of these
            return result.get("event") in ("failed", "cancelled", "ended")
        case "destination", "drained" | "failed":
            return True
    return False


def _disk_against(args: argparse.Namespace) -> str:
    """The same, by the intent on disk: the guest may have left, and the outcome is not known."""
    from postcopyd.host import procfs
    from postcopyd.records import store

    folder = Path(args.durable_dir or options.DEFAULT_DURABLE_DIR)
    if args.durable_dir and not folder.is_dir():
        return f"there is no folder {folder}: name the daemon's folder"
    intent = store.read_intent(folder, args.name)
    if intent is None:
        return ""
    peer, since = intent["peer"], ""
    if intent["boot"] != procfs.boot_id():
        since = ", which has restarted since,"
    return (
        f"it was to be handed to {peer} at {intent['time']} (migration {intent['migration']}), and "
        f"this host{since} has not recorded how that ended, so it may run there: start the daemon "
        f"here and see {_again(args, 'status')}, here and there"
    )
