#!/usr/bin/env bash
# What CI leaves out, part by part, with a table of how each went; hours in all.
#
#   bash launch/slow.sh [--only PART,...] [--again] [--out DIR] [--list] [--dry_run]
#
#   --only   these parts (--list says which there are)
#   --again  also parts that have passed on this commit
#   --out    where logs and table.md go, below the commit's name (default: runs/slow)
#
# A part that fails does not end the others; the status is 1 where one failed. Stopped, it goes on
# with the same command.
set -euo pipefail

# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment test
keep_memory
cd "$ROOT"
exec "$RUN" tests/slow_group.py "$@"
