"""``python -m ltrp_timm`` and ``torchrun -m ltrp_timm``: the command line."""

import sys

from ltrp_timm.commands import main

sys.exit(main())
