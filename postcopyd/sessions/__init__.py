# SPDX-License-Identifier: Apache-2.0
"""What the sessions of both roles share: the attached VM, limits, hooks, what is compared, what
is counted, what people are told of losses. A session is one migration at one of its two ends."""
