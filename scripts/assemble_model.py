"""`imageconductor assemble`, from a checkout."""

import sys

from imageconductor.commands.assemble import main

if __name__ == "__main__":
    sys.exit(main())
