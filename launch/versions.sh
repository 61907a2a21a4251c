#!/usr/bin/env bash
# The tests at both ends of the range of versions that setup.py allows, each in an environment of
# its own: Python 3.11 with the oldest of every package (jax 0.10), Python 3.12 with the newest
# (jax 0.11).
#
#   bash launch/versions.sh [--only oldest|newest] [--dry_run] [arguments of pytest, e.g. -k losses]
#
#   INSTRUCTJAX_VERSIONS   where the environments are made and kept (default: .versions of the
#                          checkout); remove newest there for the packages of today
#   INSTRUCTJAX_OLDEST, INSTRUCTJAX_NEWEST
#                          an interpreter that has all packages of this end: nothing is installed
#
# An end whose Python this machine lacks is skipped and said to be. The last lines say how each end
# went; the status is 0 where none failed and one was run.
set -euo pipefail

# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
# shellcheck source=launch/commands.sh
source "$ROOT/launch/commands.sh"

only=""
while (($#)); do
  case "$1" in
    --only)
      [[ "${2:-}" == oldest || "${2:-}" == newest ]] || fail "--only ${2:-}: oldest or newest."
      only="$2"
      shift 2
      ;;
    --dry_run) DRY_RUN=1 && shift ;;
    *) break ;;
  esac
done
place="${INSTRUCTJAX_VERSIONS:-$ROOT/.versions}"

# The lowest version of every requirement, as constraints of pip: jax>=0.10 gives jax==0.10.*.
lowest() {
  "$1" - "$ROOT/setup.py" <<'PYTHON_CODE'
import ast, pathlib, re, sys

for node in ast.walk(ast.parse(pathlib.Path(sys.argv[1]).read_text())):
  if isinstance(node, ast.keyword) and node.arg == "install_requires":
    for requirement in ast.literal_eval(node.value):
      print("{}=={}.*".format(*re.match(r"([\w-]+)>=([\d.]+)", requirement).groups()))
PYTHON_CODE
}

# run_end NAME PYTHON JAX INTERPRETER ARGUMENT...: tests one end; sets `line`.
run_end() {
  local name="$1" python="$2" jax="$3" given="$4" constraints="$place/$1.txt" status=0 found
  local variables=(-u INSTRUCTJAX_PYTHON "INSTRUCTJAX_VENV=$place/$name" "PYTHON=$python")
  shift 4
  if [[ -n "$given" ]]; then
    variables=("INSTRUCTJAX_PYTHON=$given")
  elif ! python_works "$python"; then
    line="$name: skipped, this machine has no $python with the venv module"
    return
  elif [[ "$name" == oldest ]]; then
    variables+=("PIP_CONSTRAINT=$constraints")
    if [[ -z "$DRY_RUN" ]]; then
      mkdir -p "$place"
      lowest "$python" >"$constraints"
    fi
  fi
  perform env "${variables[@]}" bash "$ROOT/launch/test.sh" "$@" || status=$?
  if [[ -n "$DRY_RUN" ]]; then return; fi
  found="$("${given:-$place/$name/bin/python}" -c '
import importlib.metadata, platform
print("Python", platform.python_version(), "with jax", importlib.metadata.version("jax"))
' 2>/dev/null)" || found="not installed"
  if ((status)); then
    line="$name: failed with status $status ($found)" failed=1
  elif [[ "$found" != "Python ${python#python}."*" jax $jax."* ]]; then
    line="$name: failed, $found is not $python with jax $jax" failed=1
  else
    line="$name: passed ($found)" ran=1
  fi
}

failed=0 ran=0 said=""
for name in oldest newest; do
  if [[ -n "$only" && "$name" != "$only" ]]; then continue; fi
  line=""
  if [[ "$name" == oldest ]]; then
    run_end oldest python3.11 0.10 "${INSTRUCTJAX_OLDEST:-}" "$@"
  else
    run_end newest python3.12 0.11 "${INSTRUCTJAX_NEWEST:-}" "$@"
  fi
  if [[ -n "$line" ]]; then said+="$line"$'\n'; fi
done
printf '%s' "$said"
if [[ -n "$DRY_RUN" ]]; then exit; fi
((!failed && ran)) || exit 1
