# SPDX-License-Identifier: Apache-2.0
"""`postcopyd demo`: two daemons, a guest, one real migration, every page verified."""

from __future__ import annotations

import argparse
import dataclasses
import os
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import trio

from postcopyd.cli import progress
from postcopyd.demo.hosts import DemoError, Host, ProcessGuest, open_hosts
from postcopyd.tasks import threads

NAME = "demo"
PROCESS_MEMORY = 256 << 20
QEMU_MEMORY = 1 << 30
RUN_S = 0.5
"""How long the guest is seen to work before and after the migration."""


def run(args: argparse.Namespace) -> int:
    """The verb. Returns the exit status: 0 when the guest arrived and every page was right."""
    guest = {"process": _process, "qemu": _qemu}[args.guest]
    memory = args.memory or {"process": PROCESS_MEMORY, "qemu": QEMU_MEMORY}[args.guest]
    # Records on tmpfs, as in service: a disk would be in the blackout.
    shm = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="postcopyd-demo-", dir=shm) as folder:
        try:
            result = trio.run(guest, Path(folder), memory, args.json)
        except BaseExceptionGroup as group:
            raise _first(group) from None
    result |= {"guest": args.guest, "daemons": 2}
    if args.json:
        progress.emit(result)
    elif result["event"] == "completed":
        print(progress.summary(result, "the second daemon", progress.screen()))
        print(
            f"verified: {result['verifiedPages']} pages checked by the guest itself, "
            f"{result['badPages']} bad"
        )
    if result["event"] != "completed":
        raise DemoError(f"the migration did not complete: {result.get('error')}")
    if not result["verified"]:
        raise DemoError(f"the guest found {result['badPages']} bad pages after the migration")
    return 0


def _first(group: BaseExceptionGroup[Any]) -> BaseException:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error


async def _migrate(source: Host, destination: Host, as_json: bool) -> dict[str, Any]:
    with progress.view(as_json) as view:
        return await source.migrate(NAME, destination, view.show)


async def _process(folder: Path, memory: int, as_json: bool) -> dict[str, Any]:
    options = ("--memory", str(memory), "--threads", "4", "--backing", "memfd")
    async with AsyncExitStack() as held:
        leaving = ProcessGuest(folder / "source.vmm", *options)
        held.callback(leaving.kill)
        arriving = ProcessGuest(folder / "destination.vmm", *options, "--incoming")
        held.callback(arriving.kill)
        source, destination = await held.enter_async_context(open_hosts(folder, tls=True))
        await source.attach(NAME, "process", leaving.path)
        await destination.attach(NAME, "process", arriving.path)
        await trio.sleep(RUN_S)
        result = await _migrate(source, destination, as_json)
        await trio.sleep(RUN_S)
        await destination.call("Detach", name=NAME)
        pages, bad = 0, 0
        if result["event"] == "completed":
            pages, bad = await trio.to_thread.run_sync(arriving.verify, limiter=threads.DEMO)
    return result | {"verified": pages > 0 and bad == 0, "verifiedPages": pages, "badPages": bad}


async def _qemu(folder: Path, memory: int, as_json: bool) -> dict[str, Any]:
    from postcopyd.demo import initramfs
    from postcopyd.demo import qemu_guest as q

    qemus, kernel = q.find_qemus(), initramfs.find_kernel()
    archive = folder / "initramfs"
    initramfs.write(archive, initramfs.find_init())
    config = q.GuestConfig(
        qemu=qemus[-1], kernel=kernel, initramfs=archive, memory=memory, name="source"
    )
    async with open_hosts(folder, tls=True) as (source, destination), q.Guest.open(folder) as guest:
        leaving = await guest.launch(config)
        await guest.ready()
        arriving = await guest.launch(
            dataclasses.replace(config, name="destination", incoming=True)
        )
        await source.attach(NAME, "qemu", leaving.qmp_path)
        await destination.attach(NAME, "qemu", arriving.qmp_path)
        await trio.sleep(RUN_S)
        result = await _migrate(source, destination, as_json)
        if result["event"] != "completed":
            return result | {"verified": False, "verifiedPages": 0, "badPages": 0}
        sweep = await guest.sweep()
        bad = max(sweep.bad, await guest.bad_pages())
    return result | {"verified": bad == 0, "verifiedPages": sweep.pages, "badPages": bad}
