# SPDX-License-Identifier: Apache-2.0
"""postcopyd: postcopy live migration of running virtual machines, from outside the VMM."""

__version__ = "0.1.0"
