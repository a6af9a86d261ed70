# SPDX-License-Identifier: Apache-2.0
"""A file whose reads take as long as a test wants, with the reader's pages pinned meanwhile.

One file is mounted by FUSE over another (linux/fuse.h, protocol 7.31). A read of it with O_DIRECT
pins the pages that it goes to, waits for the answer from here, and then they are written. What QEMU
itself can delay (throttling, null-co) it delays before the read, or without pages of a disk's.
"""

from __future__ import annotations

import ctypes
import errno
import heapq
import os
import select
import stat
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from needs import missing

FORGET, GETATTR, SETATTR, OPEN, READ, RELEASE = 2, 3, 4, 14, 15, 18
FSYNC, FLUSH, INIT, INTERRUPT, DESTROY, BATCH_FORGET = 20, 25, 26, 36, 38, 42
UNANSWERED = {FORGET, INTERRUPT, BATCH_FORGET}
ASYNC_READ, ASYNC_DIO, MAX_PAGES, OPEN_DIRECT_IO = 1 << 0, 1 << 15, 1 << 22, 1
MNT_DETACH = 2
BUFFER = 2 << 20  # more than the largest request


class SlowDisk:
    """The file at `path` while `slow_disk` is open. Reads are seen and held up, nothing is
    written."""

    def __init__(self, path: Path, device: int) -> None:
        self.path = path
        self.delay = 0.0
        """Seconds that each read takes from now on."""
        self.reads = 0
        """Answered."""
        self.pending = 0
        """Under way: their pages are pinned."""
        self._content = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._device = device
        self._over = os.eventfd(0, os.EFD_CLOEXEC)
        self._due: list[tuple[float, int, int, int]] = []  # reads: when, unique, offset, size
        os.set_blocking(device, False)

    def serve(self) -> None:
        while True:
            wait = max(0.0, self._due[0][0] - time.monotonic()) if self._due else None
            if self._over in select.select([self._device, self._over], [], [], wait)[0]:
                return
            while self._due and self._due[0][0] <= time.monotonic():
                self._read(*heapq.heappop(self._due)[1:])
            try:
                self._take(os.read(self._device, BUFFER))
            except BlockingIOError:
                continue
            except OSError as error:
                if error.errno == errno.ENODEV:  # unmounted, and nobody has it open
                    return

    def _take(self, request: bytes) -> None:
        _, opcode, unique = struct.unpack_from("<IIQ", request)
        body = request[40:]
        if opcode in UNANSWERED:
            return
        if opcode == INIT:
            readahead = struct.unpack_from("<4I", body)[2]
            flags = ASYNC_READ | ASYNC_DIO | MAX_PAGES
            answer = struct.pack(
                "<4IHHIIHHI28x", 7, 31, readahead, flags, 64, 48, 1 << 20, 1, 256, 0, 0
            )
            self._answer(unique, answer)
        elif opcode in (GETATTR, SETATTR):
            size = os.fstat(self._content).st_size
            mode = stat.S_IFREG | 0o666
            attributes = struct.pack("<6Q10I", 1, size, size >> 9, *[0] * 6, mode, 1, *[0] * 5)
            self._answer(unique, struct.pack("<QII", 1, 0, 0) + attributes)
        elif opcode == OPEN:
            self._answer(unique, struct.pack("<QII", 0, OPEN_DIRECT_IO, 0))
        elif opcode == READ:
            offset, size = struct.unpack_from("<QI", body, 8)
            self.pending += 1
            heapq.heappush(self._due, (time.monotonic() + self.delay, unique, offset, size))
        elif opcode in (RELEASE, FSYNC, FLUSH, DESTROY):
            self._answer(unique, b"")
        else:
            self._answer(unique, b"", errno.ENOSYS)

    def _read(self, unique: int, offset: int, size: int) -> None:
        # Counted before the answer: who has that must not find its read under way.
        self.pending -= 1
        self.reads += 1
        self._answer(unique, os.pread(self._content, size, offset))

    def _answer(self, unique: int, data: bytes, error: int = 0) -> None:
        with suppress(OSError):  # ENOENT: interrupted meanwhile; ENODEV: unmounted
            os.write(self._device, struct.pack("<IiQ", 16 + len(data), -error, unique) + data)

    def end(self) -> None:
        """Whoever still reads gets an error."""
        os.eventfd_write(self._over, 1)

    def close(self) -> None:
        os.close(self._content)
        os.close(self._over)


@contextmanager
def slow_disk(path: Path) -> Iterator[SlowDisk]:
    """Mounts over the file, which keeps its content; end whoever has it open before the end."""
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        missing(f"/dev/fuse ({error.strerror})")
    disk = SlowDisk(path, device)
    options = f"fd={device},rootmode=100666,user_id=0,group_id=0,allow_other"
    place = os.fsencode(path)
    if libc.mount(b"postcopyd-tests", place, b"fuse", 0, options.encode()) != 0:
        disk.close()
        os.close(device)
        missing(f"mounting by FUSE ({os.strerror(ctypes.get_errno())})")
    thread = threading.Thread(target=disk.serve, daemon=True)
    thread.start()
    try:
        yield disk
    finally:
        libc.umount2(place, MNT_DETACH)
        disk.end()
        thread.join()
        disk.close()
        os.close(device)
