# SPDX-License-Identifier: Apache-2.0
"""Makes the C source of `postcopyd._native`; the build runs it by cffi-gen-src.

The two headers are the only description of the interface: the C compiler includes them, and cffi
reads the same text, without its preprocessor lines and comments.
"""

import re
from pathlib import Path

from cffi import FFI

HEADERS = ("native.h", "adopt.h")
here = Path(__file__).parent

ffibuilder = FFI()
for header in HEADERS:
    text = re.sub(r"#ifdef ADOPT_TEST.*?#endif", "", (here / header).read_text(), flags=re.DOTALL)
    ffibuilder.cdef(re.sub(r"/\*.*?\*/|^\s*#.*?$", "", text, flags=re.DOTALL | re.MULTILINE))
ffibuilder.set_source(
    "postcopyd._native",
    "".join(f'#include "{header}"\n' for header in HEADERS),
    py_limited_api=True,
)
