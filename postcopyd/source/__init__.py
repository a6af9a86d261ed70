# SPDX-License-Identifier: Apache-2.0
"""What the daemon does for a guest that leaves: the session and its native engine."""
