# SPDX-License-Identifier: Apache-2.0
"""What the daemon does for a guest that arrives: the session, one file for each of its phases, and
the native engine. `session.py` is the way in: it has the phases in their order."""
