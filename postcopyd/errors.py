# SPDX-License-Identifier: Apache-2.0
"""The one exception that reaches an operator: a name for programs and a sentence for people."""

from __future__ import annotations


class PostcopydError(Exception):
    """What could not be done; `str()` is one sentence: what was being done, why not, what to do.

    `name` is the error's name on the control socket, without the interface (`NoSuchVm`).
    """

    name = "NotPossible"

    def __init__(self, sentence: str, name: str | None = None) -> None:
        super().__init__(sentence)
        if name is not None:
            self.name = name
