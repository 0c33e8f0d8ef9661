"""`python -m vit_client.cli`, for where scripts are not on the PATH."""

import sys

from . import main

sys.exit(main())
