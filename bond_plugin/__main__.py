"""``python -m bond_plugin``: the ``bond`` command."""

import sys

from bond_plugin.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
