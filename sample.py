"""`imageconductor sample`, from a checkout."""

import sys

from imageconductor.commands.sample import main

if __name__ == "__main__":
    sys.exit(main())
