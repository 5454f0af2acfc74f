"""`python -m muxmesh` is the `muxmesh` command."""

import sys

from muxmesh.cli.main import main

sys.exit(main())
