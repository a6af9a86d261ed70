# SPDX-License-Identifier: Apache-2.0
"""Connections between daemons: names, dialling, accepting, TLS and who a peer is. Drives the
control channel by the tables of `handover`; hands data connections to the engines."""
