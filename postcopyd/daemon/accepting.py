# SPDX-License-Identifier: Apache-2.0
"""Serves connections from other daemons. Each connection says first what it is for.

Owns a connection from its acceptance until it is served, in the task that serves it, and closes it;
a data connection is handed to the session whose migration it names. Owns the arrivals that are
under way, by migration: each has its VM claimed, and runs in the task of the control connection
that it came by. What happens within an arrival is its session's business.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import structlog
import trio

from postcopyd import protocol as p
from postcopyd.daemon.domains import Domains
from postcopyd.daemon.inquiries import Inquiries
from postcopyd.daemon.registry import certainly_ended, tidy
from postcopyd.dest.restart import call_off
from postcopyd.dest.session import DestinationSession
from postcopyd.errors import PostcopydError
from postcopyd.handover import Destination, Machine
from postcopyd.net.channel import CONNECT_S, Channel, PeerError
from postcopyd.net.codec import pack, parse_message
from postcopyd.net.connection import accepted_kind, hang_up, receive_object, tune
from postcopyd.net.peers import Visitor
from postcopyd.net.tls import TlsFailed, handshake, same_peer
from postcopyd.protocol import POISONED, RemoteProtocolError
from postcopyd.sessions.hooks import run_hooks
from postcopyd.sessions.shared import Shared
from postcopyd.sessions.vm import DAEMON, Vm
from postcopyd.tasks.nursery import open_nursery

ANSWER_S = 10.0
"""How long a source that asks about a migration waits for a session that is at its end."""

log = structlog.get_logger()


class Acceptor:
    """Serves the peers of one daemon. `vms` are the daemon's VMs; `arrived` is called with a VM
    when it is free again after its arrival."""

    def __init__(
        self,
        shared: Shared,
        vms: Mapping[str, Vm],
        arrived: Callable[[Vm, DestinationSession], None],
        inquiries: Inquiries,
        domains: Domains,
    ) -> None:
        self._shared = shared
        self._vms = vms
        self._arrived = arrived
        self._inquiries = inquiries
        self._domains = domains
        self.sessions: dict[str, DestinationSession] = {}

    async def serve_peer(self, stream: trio.SocketStream) -> None:
        """Serves one connection from another daemon, control or data. Never raises for what a peer
        does."""
        try:
            tune(stream.socket)
            # A socket for both families shows IPv4 addresses as IPv6 ones.
            peer = str(stream.socket.getpeername()[0]).removeprefix("::ffff:")
            with self._shared.limits.peers.visit(peer) as visitor, visitor.scope:
                await self._serve(stream, peer, visitor)
            if visitor.scope.cancelled_caught:
                log.debug("connection refused", peer=peer, error="too many at the door")
        except (PostcopydError, trio.BrokenResourceError, trio.TooSlowError, OSError) as error:
            log.warning("connection refused", error=str(error) or type(error).__name__)
        except Exception:  # a bug in serving one peer must not end the others
            log.exception("bug in serving a peer")
        finally:
            await trio.aclose_forcefully(stream)

    async def _serve(self, stream: trio.SocketStream, peer: str, visitor: Visitor) -> None:
        kind = await accepted_kind(stream)
        if kind.endswith(" tls") != (self._shared.tls is not None):
            await self._refuse(stream, kind, peer)
        elif kind in (p.DATA, p.DATA_TLS):
            await self._take_data(stream)
        else:
            await self._take_control(await self._trusted(stream, peer), visitor)

    async def _refuse(self, stream: trio.SocketStream, kind: str, peer: str) -> None:
        """Refuses a peer when only one of the two sides uses TLS, and tells it so. Raises
        PostcopydError."""
        which, other = ("with", "without") if self._shared.tls else ("without", "with")
        sentence = (
            f"the daemon at the destination was started {which} TLS, and the one at the source "
            f"{other}: start both with TLS, or both with `--tls off`"
        )
        if kind in (p.CONTROL, p.CONTROL_TLS):
            await stream.send_all(pack(p.Error(name="TlsFailed", message=sentence)))
            await hang_up(stream)
        raise TlsFailed(f"a connection from {peer} was refused: {sentence}")

    async def _trusted(self, stream: trio.SocketStream, peer: str) -> Channel:
        """A control connection. With TLS its source has shown its certificate. Raises
        PostcopydError."""
        machine = Machine(Destination.GREETING)
        channel = partial(
            Channel, instance=self._shared.instance, daemon=self._shared.daemon, peer=peer
        )
        if self._shared.tls is None:
            return channel(stream, machine)
        secure = self._shared.tls.server(stream)
        try:
            with trio.fail_after(CONNECT_S):
                names = await handshake(secure, peer)
        except TlsFailed:
            await hang_up(stream)  # sends the alert that TLS has for it
            raise
        except trio.TooSlowError:
            raise TlsFailed(f"{peer} did not finish TLS within {CONNECT_S:.0f} s") from None
        return channel(secure, machine, names=names)

    async def _take_data(self, stream: trio.SocketStream) -> None:
        hello: p.DataHello = await receive_object(stream, p.DataHello)
        session = self.sessions.get(hello.migration)
        if session is None:
            raise RemoteProtocolError(
                f"a data connection named migration {hello.migration}, which is not here"
            )
        await session.take_data(stream, hello)

    async def _take_control(self, channel: Channel, visitor: Visitor) -> None:
        address = channel.peer
        try:
            hello = await channel.greet()
            channel.peer = f"{hello.host or address} ({address})"
            first = await channel.receive(CONNECT_S)
            known = isinstance(first, p.Resume) and first.vm in self._vms
            visitor.let_in(always=known)
            if isinstance(first, p.Resume):
                await self._take_question(channel, first)
            elif isinstance(first, p.Offer):
                await self._take_offer(channel, first)
            else:
                raise PeerError(f"{channel.peer} took its offer back", "Cancelled")
        except PostcopydError as error:
            log.warning("connection refused", peer=channel.peer, error=str(error))
            await channel.tell_error(error)
        finally:
            await channel.aclose()

    # --- a migration begins ----------------------------------------------------------------------

    async def _take_offer(self, channel: Channel, offer: p.Offer) -> None:
        tls = self._shared.tls
        if tls is not None and offer.check and not offer.definition:
            tls.allow(channel.names, "control", "send")
        elif tls is not None:  # to say what a definition lacks, libvirt runs the QEMU that it names
            tls.allow(channel.names, "send")
        if not offer.check:
            await self._prepare(channel, offer)
        if (known := self._vms.get(offer.vm)) is not None:
            await known.ended()
        if not self._domains.to_be_made(offer):
            await self._take_guest(channel, offer, self._vm(offer.vm))
        elif offer.check:
            problems = await self._domains.unfit(offer) + self._domains.lacks(offer)
            await channel.send(p.Checked([p.sentence(problem) for problem in problems]))
        else:
            async with self._domains.expected(channel, offer) as vm:
                await self._take_guest(channel, offer, vm)

    async def _take_guest(self, channel: Channel, offer: p.Offer, vm: Vm) -> None:
        vm.attached()
        if vm.claimed_by is None and vm.status.phase == "paused":
            raise PostcopydError(
                f"{offer.vm} is known at the destination, in a migration that is not at its end: "
                f"{vm.status.message}",
                "Busy",
            )
        session = DestinationSession(vm, offer, channel, self._shared)
        if offer.check:
            with vm.claim(session):
                await session.check()
            return
        with self._arriving(vm, session, offer.migration):
            await session.run()
        self._arrived(vm, session)

    async def _prepare(self, channel: Channel, offer: p.Offer) -> None:
        """Runs the hooks that prepare this host for the guest. Stops when the source takes its
        offer back or is gone. Raises PostcopydError."""
        async with channel.alive(), open_nursery() as nursery:
            nursery.start_soon(_hear_end, channel)
            await run_hooks(
                self._shared.hooks,
                offer.vm,
                "destination",
                "prepare",
                migration=offer.migration,
                peer=channel.peer,
            )
            nursery.cancel_scope.cancel()

    # --- a migration goes on ---------------------------------------------------------------------

    async def _take_question(self, channel: Channel, asked: p.Resume) -> None:
        """A source asks what became of its guest: it is told, or sends the rest of the pages."""
        known = self._vms.get(asked.vm)
        about = known.about if known else {}
        if about.get("migration") != asked.migration:
            about = self._shared.store.answered(asked.vm, asked.migration)
        self._may_ask(channel, asked, about.get("identity", ()))
        past = about and (known is None or about is not known.about)
        if past and not asked.look and about["offer"]["epoch"] == asked.epoch:
            await _answer(channel, about)
            return
        vm = self._vm(asked.vm)
        if asked.look:
            same = vm.about.get("migration") == asked.migration
            said = vm.status.message if same else f"it knows {vm.name}, and not of this move"
            await channel.send(p.Checked([p.sentence(said)]))
        else:
            await self._resume(channel, asked, vm)

    def _may_ask(self, channel: Channel, asked: p.Resume, identity: Collection[str]) -> None:
        """Raises PostcopydError for a peer that is not the source of this migration; `identity` has
        the certificate names of that source."""
        tls = self._shared.tls
        if tls is not None and asked.look:
            tls.allow(channel.names, "control", "send")
        elif tls is not None and not identity:
            # A source that began a move may finish it even if [peers] has changed: its guest waits.
            tls.allow(channel.names, "send")
        same_peer(identity, channel.names, asked.vm)

    async def _resume(self, channel: Channel, asked: p.Resume, vm: Vm) -> None:
        self._must_be_last(vm, asked)  # before the present session is disturbed for it
        session = self.sessions.get(asked.migration)
        if session is not None and session.vm is vm:
            await session.drop()
        with trio.move_on_after(ANSWER_S):
            await vm.free.wait()
        self._must_be_last(vm, asked)
        if isinstance(vm.waiting, DestinationSession) and not vm.waiting.over:
            if vm.waiting.poisoned:
                raise PostcopydError(
                    f"the missing pages of {vm.name} were given up at the destination by a person, "
                    f"and it goes on there without them: `postcopyd resolve {vm.name} --kill` "
                    f"here ends what is left of it",
                    POISONED,
                )
            session = vm.waiting
            with self._arriving(vm, session, asked.migration):
                vm.waiting = None
                await session.resume(channel, asked)
            self._arrived(vm, session)
        elif vm.ownership == "loading" and vm.claimed_by is None and _can_end(vm):
            with vm.claim(DAEMON):  # this arrival was called off, but its VMM did not end then
                await call_off(vm)
            await _answer(channel, vm.about)
        elif "answer" in vm.about:
            await _answer(channel, vm.about)
        else:
            raise PostcopydError(f"at the destination: {vm.status.message}", "Paused")

    def _must_be_last(self, vm: Vm, asked: p.Resume) -> None:
        """Raises PostcopydError when this was not the last arrival of this VM."""
        if not vm.about and vm.status.phase == "paused" and self._inquiries.of(vm) is None:
            # The record cannot be read: the guest may run here.
            raise PostcopydError(f"at the destination: {vm.status.message}", "Paused")
        epoch = vm.about.get("offer", {}).get("epoch")
        if (vm.about.get("migration"), epoch) != (asked.migration, asked.epoch):
            raise PostcopydError(
                f"the destination knows nothing of this move of {asked.vm} any more: it has "
                f"restarted, or {asked.vm} was detached there; if it has restarted, the guest that "
                f"ran there is gone: decide with `postcopyd resolve {asked.vm}` here",
                "NotMigrating",
            )

    @contextmanager
    def _arriving(self, vm: Vm, session: DestinationSession, migration: str) -> Iterator[None]:
        """Within it, data connections that name this migration go to the session. Raises
        PostcopydError when the migration is arriving already."""
        if (other := self.sessions.get(migration)) is not None:
            raise PostcopydError(
                f"migration {migration} is arriving already, as {other.vm.name}", "Busy"
            )
        with vm.claim(session):
            self.sessions[migration] = session
            try:
                yield
            finally:
                del self.sessions[migration]
                self._shared.limits.arrivals.leave(migration)
        tidy()

    def _vm(self, name: str) -> Vm:
        if name not in self._vms:
            raise PostcopydError(
                f"no VM {name} is attached at the destination: start its VMM there, waiting for a "
                f"migration, and `postcopyd attach {name}`",
                "NoSuchVm",
            )
        return self._vms[name]


async def _hear_end(channel: Channel) -> None:
    """Raises when the source takes its offer back or is gone; no other message is due."""
    await channel.receive()
    raise PeerError(f"{channel.peer} took its offer back", "Cancelled")


async def _answer(channel: Channel, about: dict[str, Any]) -> None:
    """Sends what the record says of how an arrival ended."""
    await channel.send(parse_message(about["answer"]))
    with trio.move_on_after(ANSWER_S):  # until the source acknowledges or closes
        about["acknowledged"] = isinstance(await channel.receive(), p.Acknowledged)


def _can_end(vm: Vm) -> bool:
    """Whether its VMM has ended or can be told to end. After a restart of the daemon, a VMM that
    lives but does not answer yet must not be taken for ended."""
    return vm.driver is not None or certainly_ended(vm)
