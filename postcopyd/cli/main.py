# SPDX-License-Identifier: Apache-2.0
"""The command line: the arguments of every verb; turns errors into sentences and exit statuses.

Must not import what only one verb needs before that verb runs: `postcopyd --help` is instant, and
no client loads trio. What the client verbs do is in `verbs`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from postcopyd import __version__
from postcopyd.cli import verbs
from postcopyd.cli.verbs import CRASHED, DONE, FAILED, INTERRUPTED, USAGE, Failed
from postcopyd.config import options as config
from postcopyd.errors import PostcopydError

_T = TypeVar("_T")


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"postcopyd: {message}; `{self.prog} --help` says more\n")


def _argument(parse: Callable[[str], _T]) -> Callable[[str], _T]:
    def parsed(text: str) -> _T:
        try:
            return parse(text)
        except PostcopydError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parsed


def _number(least: float, kind: Callable[[str], _T]) -> Callable[[str], _T]:
    def parsed(text: str) -> _T:
        try:
            value = kind(text)
            good = least <= value < float("inf")  # type: ignore[operator]  # int and float only
        except ValueError:
            good = False
        if not good:
            raise argparse.ArgumentTypeError(f"{text!r} is no number from {least} up")
        return value

    return parsed


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = _Parser(prog="postcopyd", description="Moves running guests between hosts.")
    top.add_argument("--version", action="store_true", help="say the version and exit")
    subparsers = top.add_subparsers(metavar="VERB", title="verbs")
    address = _argument(config.parse_address)
    size = _argument(config.parse_size)
    rate = _argument(config.parse_rate)

    def verb(name: str, run: Callable[[argparse.Namespace], int], text: str) -> _Parser:
        made = subparsers.add_parser(name, help=text, description=text)
        made.set_defaults(run=run)
        return made

    def client(
        name: str, run: Callable[[argparse.Namespace], int], text: str, named: str | None = "NAME"
    ) -> _Parser:
        made = verb(name, run, text)
        if named:
            made.add_argument("name", metavar="NAME", nargs="?" if named == "[NAME]" else None)
        made.add_argument("--control", metavar="PATH", help="the daemon's control socket")
        made.add_argument("--json", action="store_true", help="JSON objects, one on a line")
        return made

    serve = verb("serve", _serve, "run the daemon of this host")
    for name, key in config.KEYS.items():
        serve.add_argument(
            f"--{name}", metavar=key.metavar, type=_argument(key.parse), help=key.help,
            default=argparse.SUPPRESS,
        )  # fmt: skip
    serve.add_argument(
        "--peer", metavar="NAME[=ADDRESS][,may=send+receive+control]", action="append",
        type=_argument(config.parse_peer), dest="peers", default=argparse.SUPPRESS, help=(
            "another host by a name in its certificate, and what it may do; repeat for more. "
            "Without any, whoever has a certificate of the CA may do everything"
        ),
    )  # fmt: skip
    serve.add_argument("--config", metavar="FILE", help=(
        "read these options from FILE (TOML) and FILE.d/*.toml; by default from postcopyd.toml in "
        "/etc/postcopyd, /run/postcopyd or /usr/lib/postcopyd, and postcopyd.toml.d/*.toml there"
    ))  # fmt: skip
    serve.add_argument(
        "--check-config", action="store_true", help="print the resulting configuration, and exit"
    )

    attach = client("attach", verbs.attach, "tell the daemon of a VM on this host")
    vmm = attach.add_mutually_exclusive_group(required=True)
    vmm.add_argument("--qemu", metavar="QMP_SOCKET", help="a QEMU's QMP socket")
    vmm.add_argument("--libvirt", action="store_true", help="a domain of this host's libvirt")
    vmm.add_argument("--process", metavar="SOCKET", help="the socket of a cooperating VMM")
    client("detach", verbs.detach, "make the daemon forget a VM, which goes on as it is")
    check = client("check", verbs.check, "find what would make a migration fail; changes nothing")
    check.add_argument(
        "--to", metavar="HOST[:PORT]", type=address, required=True, help="the destination"
    )
    migrate = client("migrate", verbs.migrate, "move a guest, and return when its memory is there")
    migrate.add_argument(
        "--to", metavar="HOST[:PORT]", type=address, required=True, help="the destination"
    )
    migrate.add_argument("--mode", choices=config.MODES, default="hybrid", help=(
        "hybrid (the default): copy memory while the guest runs, then postcopy; postcopy: hand the "
        "guest over at once; precopy: run it there only when all of its memory is there"
    ))  # fmt: skip
    migrate.add_argument("--bandwidth", metavar="RATE", type=rate, help=(
        "limit pages that nobody waits for, in bytes per second; K, M, G"
    ))  # fmt: skip
    migrate.add_argument("--precopy-passes", metavar="N", type=_number(0, int), help=(
        "make at most N passes; by default the daemon decides by what it measures"
    ))  # fmt: skip
    migrate.add_argument("--max-downtime", metavar="MS", type=_number(0.001, float), help=(
        "precopy: stop the guest when the rest takes at most MS milliseconds (300)"
    ))  # fmt: skip
    migrate.add_argument(
        "--keep-source", action="store_true", help="leave the source's VMM, stopped"
    )
    for moving in (check, migrate):
        moving.add_argument("--unsafe", action="store_true", help=(
            "you assert that both hosts have the same disk files, where the daemons cannot see it"
        ))  # fmt: skip
        moving.add_argument("--xml", metavar="FILE", help=(
            "the XML that a domain of libvirt has there, for the same machine"
        ))  # fmt: skip
    migrate.add_argument("--persistent", action="store_true", help=(
        "make a domain of libvirt persistent there"
    ))  # fmt: skip
    migrate.add_argument("--undefinesource", action="store_true", help=(
        "undefine a domain of libvirt here; without these two both is done if it is persistent"
    ))  # fmt: skip
    client("list", verbs.list, "list the attached VMs", named=None)
    client("status", verbs.status, "say what is known of one VM, or of all", named="[NAME]")
    client("watch", verbs.watch, "follow a VM until interrupted")
    client("cancel", verbs.cancel, "cancel a migration, before the destination owns the guest")
    recover = client("recover", verbs.recover, "connect a paused migration again at once")
    recover.add_argument("--to", metavar="HOST[:PORT]", type=address, help=(
        "another address of the same destination"
    ))  # fmt: skip
    resolve = client("resolve", verbs.resolve, "decide about a paused migration")
    way = resolve.add_mutually_exclusive_group(required=True)
    for decision, text in (
        ("wait", "change nothing, and go on waiting"),
        (
            "poison",
            "at the destination, when the source is lost: missing pages become memory errors",
        ),
        ("kill", "end the VMM of this host"),
        (
            "take-back",
            "at the source, when the destination is certainly dead: run the guest as it was when "
            "it stopped here; its disks are not set back",
        ),
    ):
        way.add_argument(
            f"--{decision}", action="store_const", const=decision.replace("-", "_"),
            dest="decision", help=text,
        )  # fmt: skip
    may_run = client("may-run", verbs.may_run, "ask before you start a guest on this host")
    may_run.add_argument("--domain", action="store_true", help=(
        "for libvirt's hook: read the XML of the domain that starts, which may be one that the "
        "daemon makes for its guest"
    ))  # fmt: skip
    may_run.add_argument("--durable-dir", metavar="DIR", help="as given to the daemon")
    may_run.add_argument(
        "--state-dir", metavar="DIR", help="as given to the daemon; read when it does not answer"
    )

    certs = verb("certs", _certs, "make the certificates of a host, and a CA if there is none")
    certs.add_argument("--dir", metavar="DIR", required=True, help="write the five files here")
    certs.add_argument("--host", metavar="NAME", action="append", required=True, help=(
        "a DNS name or IP address by which others reach the host; repeat for more"
    ))  # fmt: skip
    certs.add_argument(
        "--ca", metavar="DIR", help="the folder of the CA, made if it is missing; --dir by default"
    )
    demo = verb("demo", _demo, "move a guest between two daemons here, and verify its memory")
    demo.add_argument("--guest", choices=("process", "qemu"), default="process")
    demo.add_argument("--memory", metavar="SIZE", type=size, help="guest RAM")
    demo.add_argument("--json", action="store_true", help="JSON objects, one on a line")
    doctor = verb("doctor", _doctor, "say what this host lacks to migrate guests")
    doctor.add_argument("--json", action="store_true", help="JSON objects, one on a line")
    # No help, so that nobody is told of it: postcopyd-keeper@.service runs it.
    subparsers.add_parser("keeper").set_defaults(run=_keeper)
    return top


def main(argv: list[str] | None = None) -> int:
    """Runs one verb. Returns 0: done, 1: failed, 2: usage, 3: the guest waits for recovery."""
    top = parser()
    args = top.parse_args(argv)
    try:
        if args.version:
            print(f"postcopyd {__version__}")
            return DONE
        if not hasattr(args, "run"):
            top.error("a verb is missing")
        status: int = args.run(args)
        return status
    except Failed as failed:
        return verbs.say(str(failed), failed.status)
    except PostcopydError as error:
        return verbs.say(str(error), USAGE if error.name == "InvalidRequest" else FAILED)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of stdout has gone; the interpreter must not flush to it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


def _serve(args: argparse.Namespace) -> int:
    from postcopyd.config import files

    given = {key: said for key, said in vars(args).items() if key in config.ServeOptions._fields}
    configured = files.configuration(given, args.config)
    options = configured.options
    if args.check_config:
        print(*configured.lines(), "# good", sep="\n")
        return DONE
    import traceback

    import trio

    # structlog would import rich for coloured tracebacks: a third of the time to start, while
    # guests may wait for a daemon that restarts.
    modules: dict[str, Any] = sys.modules
    modules["rich"] = None  # so that its import fails
    from postcopyd.daemon import service

    del modules["rich"]

    try:
        trio.run(service.serve, options)
    except ExceptionGroup as group:
        ours, others = group.split(PostcopydError)
        if ours is None or others is not None:
            traceback.print_exc()
            return CRASHED
        error: BaseException = ours
        while isinstance(error, ExceptionGroup):
            error = error.exceptions[0]
        raise error from None
    return DONE


def _keeper(_: argparse.Namespace) -> int:
    from postcopyd.native import cloning

    return cloning.main()


def _certs(args: argparse.Namespace) -> int:
    from pathlib import Path

    from postcopyd.cli import certs

    authority = Path(args.ca) if args.ca else None
    print("\n".join(certs.make(Path(args.dir), args.host, authority)))
    return DONE


def _demo(args: argparse.Namespace) -> int:
    from postcopyd import demo

    return int(demo.run(args) or DONE)


def _doctor(args: argparse.Namespace) -> int:
    from postcopyd.cli import doctor

    return int(doctor.run(json=args.json) or DONE)
