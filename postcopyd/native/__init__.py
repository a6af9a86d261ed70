# SPDX-License-Identifier: Apache-2.0
"""The C of this package but for `uffd_native.c`, its build, and what Python sees of it."""
