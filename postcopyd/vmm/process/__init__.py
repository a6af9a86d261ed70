# SPDX-License-Identifier: Apache-2.0
"""The driver for a cooperating VMM, by the protocol of docs/VMM-PROTOCOL.md."""
