# SPDX-License-Identifier: Apache-2.0
"""The driver for libvirt's domains: vmm/qemu, with libvirt's own monitor, and a domain that libvirt
makes where the guest arrives. Owns all that postcopyd asks of libvirt."""
