# SPDX-License-Identifier: Apache-2.0
"""The driver for an unmodified QEMU, through its monitor."""
