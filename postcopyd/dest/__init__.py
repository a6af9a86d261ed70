# SPDX-License-Identifier: Apache-2.0
"""What the daemon does for a guest that arrives: the session and its native engine."""
