# SPDX-License-Identifier: Apache-2.0
"""Sentences for people about guest memory that is lost: pages that cannot be read any more at the
source, and pages that the kernel has put into guest memory by itself. Decides nothing."""

from __future__ import annotations


def but(lost: int) -> str:
    """How a sentence goes on after "with all of its memory"."""
    return f" but {_pages(lost)} that could not be read any more" if lost else ""


def arrived(vm: str, peer: str, lost: int) -> str:
    """The sentence for a guest that is here with all of its memory, or all but `lost` pages."""
    sentence = f"{vm} is here, with all of its memory{but(lost)}"
    if lost:
        sentence += (
            f" at {peer}: it gets a memory error where it touches one; shut it down when you can, "
            f"it cannot be moved"
        )
    return sentence


def immovable(vm: str, lost: int) -> str:
    return (
        f"{vm} has lost {_pages(lost)} of its memory in its last move, and only the page tables of "
        f"its VMM know which: it can neither be moved nor detached; shut it down, and start it anew"
    )


def _pages(lost: int) -> str:
    return f"{lost} page" if lost == 1 else f"{lost} pages"


def foreign(vm: str, peer: str, why: object) -> str:
    """The sentence for a guest that runs here, into whose memory the kernel here has put pages."""
    return (
        f"the guest of {vm} here is not to be trusted any more, and is given no more of its "
        f"memory: {why}; end it by `postcopyd resolve {vm} --kill` here, then have it as it was "
        f"when it stopped at {peer}, by `postcopyd resolve {vm} --take-back` there"
    )
