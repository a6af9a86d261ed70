# SPDX-License-Identifier: Apache-2.0
"""The daemon as a process of its host: which VMs are attached, what a restart does, which peers are
let in, and what the service manager, the journal and Prometheus are told."""
