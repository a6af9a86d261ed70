# SPDX-License-Identifier: Apache-2.0
"""`python -m postcopyd`."""

import sys

from postcopyd.cli.main import main

sys.exit(main())
