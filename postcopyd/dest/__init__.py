# SPDX-License-Identifier: Apache-2.0
"""A migration at the host that the guest goes to: the session, one file for each of its phases, and
the native engine. Start reading at `session.py`, which has the phases in their order."""
