# SPDX-License-Identifier: Apache-2.0
"""Code that the sessions of both roles share: the attached VM, limits, hooks, what is compared,
what is counted, what people are told of losses. A session is one migration on one of its hosts."""
