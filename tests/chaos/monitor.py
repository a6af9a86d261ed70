# SPDX-License-Identifier: Apache-2.0
"""A QEMU's monitor as a run has it beside the daemon's: nothing of it is the product's own."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import trio


class Refused(Exception):
    """QEMU answered a command with an error."""


class Ended(Exception):
    """QEMU has closed its monitor, as it does at its end."""


class Monitor:
    """`run` reads all that QEMU says, from its greeting to its end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._numbers = itertools.count()
        self._answers: dict[int, dict[str, Any]] = {}
        self._heard = trio.lowlevel.ParkingLot()
        self._ended = False
        self._stream: trio.SocketStream
        self._put, self.events = trio.open_memory_channel[dict[str, Any]](math.inf)
        """Every event since the beginning, and the end of the channel at QEMU's end."""

    async def run(self, task_status: trio.TaskStatus[None]) -> None:
        self._stream = await trio.open_unix_socket(str(self.path))
        buffer = b""
        try:
            # Closed whatever ends this: QEMU hears no other client before.
            async with self._stream:
                async for data in self._stream:
                    *lines, buffer = (buffer + data).split(b"\n")
                    for line in lines:
                        said = json.loads(line)
                        if "QMP" in said:
                            await self._send({"execute": "qmp_capabilities", "id": -1})
                        elif said.get("id") == -1:
                            task_status.started()
                        elif "event" in said:
                            self._put.send_nowait(said)
                        else:
                            self._answers[said["id"]] = said
                            self._heard.unpark_all()
        except trio.BrokenResourceError:
            pass
        # Not when the run is called off: that says nothing of QEMU.
        self._ended = True
        self._put.close()
        self._heard.unpark_all()

    async def _send(self, message: dict[str, Any]) -> None:
        try:
            await self._stream.send_all(json.dumps(message).encode() + b"\n")
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise Ended(str(self.path)) from error

    async def execute(self, command: str, **arguments: Any) -> Any:
        """What QEMU returns; for as long as it takes. Raises Refused, Ended."""
        number = next(self._numbers)
        named = {key.replace("_", "-"): value for key, value in arguments.items()}
        await self._send({"execute": command, "arguments": named, "id": number})
        while number not in self._answers:
            if self._ended:
                raise Ended(str(self.path))
            await self._heard.park()
        answer = self._answers.pop(number)
        if "error" in answer:
            raise Refused(answer["error"]["desc"])
        return answer["return"]
