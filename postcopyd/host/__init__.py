# SPDX-License-Identifier: Apache-2.0
"""What this host is: what /proc tells of processes, what the kernel gets wrong, whether there is
room. Reads, and owns nothing."""
