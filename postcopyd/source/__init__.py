# SPDX-License-Identifier: Apache-2.0
"""What the daemon does for a guest that leaves. session.py is its life from `migrate` to `drained`,
phase by phase: offer.py, precopy.py, blackout.py, drain.py, and where it goes wrong rollback.py and
recovery.py. What they share is in migration.py, guest.py and peer.py; restart.py is for a daemon
that was started again where no session goes on."""
