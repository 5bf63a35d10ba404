"""``python -m leapalign.cli``: the command line where the script ``leapalign`` is not on the path."""

import sys

from leapalign.cli.main import main

sys.exit(main())
