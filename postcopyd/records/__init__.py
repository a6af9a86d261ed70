# SPDX-License-Identifier: Apache-2.0
"""What outlives a process: the records of VMs and their migrations, the files that hold them, and
the locks that keep a second daemon away from both. Knows only what is written down about a
migration."""
