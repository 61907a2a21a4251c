#!/usr/bin/env bash
# The whole recipe on the embedded miniature world: environment, installation, run, report.
#
#   bash launch/quickstart.sh [flags of python -m instructjax, e.g. --config.seed=1]
#
# The report ends up in runs/quickstart. A run that was interrupted is resumed.
set -euo pipefail

# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment
keep_memory
cd "$ROOT"
exec "$RUN" -m instructjax \
  --config=configs/quickstart.py --workdir=runs/quickstart "$@"
