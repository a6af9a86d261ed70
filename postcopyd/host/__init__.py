# SPDX-License-Identifier: Apache-2.0
"""What this host is: what /proc tells of processes, what its kernel gets wrong, whether it has
room. Reads, and owns nothing."""
