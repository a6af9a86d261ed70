# SPDX-License-Identifier: Apache-2.0
"""The command line: its verbs, what they show, and what works without a daemon."""
