#!/usr/bin/env bash
# The tests, on eight simulated CPU devices; slow ones only when asked for.
#
#   bash launch/test.sh [arguments of pytest, e.g. -k checkpoint, or -m slow]
#
#   INSTRUCTJAX_TEST_WORKERS  processes (default: one per core, at most 4; each takes some GiB)
set -euo pipefail

# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment test
cd "$ROOT"
workers="${INSTRUCTJAX_TEST_WORKERS:-$("$RUN" -c '
import os
print(min(os.cpu_count() or 1, 4))')}"
# By file: tests of a file share what was compiled. A worker that dies ends the run and names its
# test; a replaced one can leave pytest-xdist 3.8 waiting for ever.
exec "$RUN" -m pytest -n "$workers" --dist loadfile --max-worker-restart 0 \
  -m "not slow" "$@"
