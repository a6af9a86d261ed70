# SPDX-License-Identifier: Apache-2.0
"""The control socket: `io.postcopyd` over Varlink. Owns what a request means before the daemon
sees it."""
