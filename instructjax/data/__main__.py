"""`python -m instructjax.data prepare|describe|validate|split`; see `command.py`."""

import sys

if __name__ == '__main__':
  # Not above: worker processes import this file, and need nothing of the command.
  from instructjax.data.command import main

  sys.exit(main(sys.argv[1:]))
