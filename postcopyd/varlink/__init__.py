# SPDX-License-Identifier: Apache-2.0
"""Varlink on trio: the interface language, a server, a client. Knows nothing of who uses it, and
imports nothing of this package."""
