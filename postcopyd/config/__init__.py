# SPDX-License-Identifier: Apache-2.0
"""What an operator sets: the options, their kinds and limits, and the files that they come from.
Owns the sentences for what is wrong in them. Imports `errors` only."""
