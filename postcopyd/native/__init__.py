# SPDX-License-Identifier: Apache-2.0
"""The C of this package except `uffd_native.c`, its build, and the parts of it that Python uses."""
