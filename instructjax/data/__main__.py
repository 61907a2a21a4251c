"""`python -m instructjax.data prepare|describe|validate|split`; see `command.py`."""

import os
import sys

if __name__ == '__main__':
  # Nothing here computes: an accelerator stays free for who does.
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  # Not above: worker processes import this file, and need nothing of the command.
  from instructjax.data.command import main

  sys.exit(main(sys.argv[1:]))
