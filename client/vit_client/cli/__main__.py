"""`python -m vit_client.cli`, in case scripts are not on the PATH."""

import sys

from . import main

sys.exit(main())
