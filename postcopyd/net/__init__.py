# SPDX-License-Identifier: Apache-2.0
"""Connections between daemons: names, dialling, accepting, TLS and who a peer is. Drives the
control channel by the tables of `handover`; data connections are handed to the engines."""
