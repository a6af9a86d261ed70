# SPDX-License-Identifier: Apache-2.0
"""What people are told of guest memory that is lost: pages that cannot be read any more at the
source, and what the kernel has put into guest memory by itself. Sentences; decides nothing."""

from __future__ import annotations


def but(lost: int) -> str:
    """How `with all of its memory` goes on."""
    if not lost:
        return ""
    pages = "page" if lost == 1 else "pages"
    return f" but {lost} {pages} that could not be read any more"


def arrived(vm: str, peer: str, lost: int) -> str:
    """The state of a guest here that has all of its memory, or all but `lost` pages."""
    sentence = f"{vm} is here, with all of its memory{but(lost)}"
    if lost:
        sentence += (
            f" at {peer}: it gets a memory error where it touches one; shut it down when you can, "
            f"it cannot be moved"
        )
    return sentence


def immovable(vm: str, lost: int) -> str:
    return (
        f"{vm} has lost {lost} pages of its memory in its move here, and only the page tables of "
        f"its VMM know which: it can neither be moved nor detached; shut it down, and start it anew"
    )


def foreign(vm: str, peer: str, why: object) -> str:
    """The kernel here has put pages into the memory of a guest that runs here already."""
    return (
        f"the guest of {vm} here is not to be trusted any more, and is given no more of its "
        f"memory: {why}; end it by `postcopyd resolve {vm} --kill` here, then have it as it was "
        f"when it stopped at {peer}, by `postcopyd resolve {vm} --take-back` there"
    )
