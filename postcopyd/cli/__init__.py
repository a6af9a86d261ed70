# SPDX-License-Identifier: Apache-2.0
"""The command line: its verbs, what they print, and the verbs that need no daemon."""
