# SPDX-License-Identifier: Apache-2.0
"""A migration at the host that the guest leaves. session.py runs it from `migrate` to `drained`,
phase by phase: offer.py, precopy.py, blackout.py, drain.py; after a failure rollback.py or
recovery.py. The phases share migration.py, guest.py and peer.py. restart.py is for a restarted
daemon, for guests whose migration no session continues."""
