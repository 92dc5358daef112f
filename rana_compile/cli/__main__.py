"""``python -m rana_compile.cli``, where the script ``rana-compile`` is not on the path."""

import sys

from rana_compile.cli import main

sys.exit(main())
