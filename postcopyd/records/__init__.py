# SPDX-License-Identifier: Apache-2.0
"""What outlives a process: the records of VMs and their migrations, the files that they are in,
and the locks that keep a second daemon away from both. Knows of a migration what is written
down."""
