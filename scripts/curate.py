"""`imageconductor curate`, from a checkout."""

import sys

from imageconductor.commands.curate import main

if __name__ == "__main__":
    sys.exit(main())
