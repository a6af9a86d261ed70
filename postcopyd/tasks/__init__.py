# SPDX-License-Identifier: Apache-2.0
"""How work is run: tasks that others depend on, and threads for slow calls. Imports `errors`
only."""
