# shellcheck shell=bash
# Sourced by the scripts beside it: finds a Python that works, and makes or reuses the virtual
# environment with this checkout installed in it.
#
#   PYTHON              the interpreter to make the environment with (default: the newest supported)
#   INSTRUCTJAX_VENV    where the environment is (default: .venv of the checkout)
#   INSTRUCTJAX_PYTHON  an interpreter that has what instructjax needs (a container's, a module's):
#                       it is used as it is, and nothing is made or installed

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${INSTRUCTJAX_VENV:-$ROOT/.venv}"
RUN="${INSTRUCTJAX_PYTHON:-$VENV/bin/python}"

fail() {
  printf '%s\n' "$@" >&2
  exit 1
}

# Runs the interpreter rather than look for its name: version managers leave launchers on the path
# that only print an error, and some systems ship Python without venv.
python_works() {
  "$1" -c '
import sys
import ensurepip, venv
sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
' >/dev/null 2>&1
}

find_python() {
  local candidate
  if [[ -n "${PYTHON:-}" ]]; then
    python_works "$PYTHON" || fail \
      "PYTHON=$PYTHON does not run, is not Python 3.11 to 3.13, or lacks the venv module." \
      "Set PYTHON to another interpreter, or unset it to search the path."
    printf '%s\n' "$PYTHON"
    return
  fi
  for candidate in python3.13 python3.12 python3.11 python3 python; do
    if python_works "$candidate"; then
      printf '%s\n' "$candidate"
      return
    fi
  done
  fail "No working Python 3.11, 3.12 or 3.13 with the venv module is on the path." \
    "Install one (Debian, Ubuntu: apt-get install python3 python3-venv; macOS: brew install" \
    "python@3.12; or https://www.python.org/downloads/), or set PYTHON=/path/to/python3.12."
}

# What the environment was installed from: it is reused while this stays the same.
install_stamp() {
  "$VENV/bin/python" - "$ROOT" <<'PYTHON_CODE'
import hashlib, pathlib, sys

root = pathlib.Path(sys.argv[1])
digest = hashlib.sha256(f"{sys.version}\n{root}\n".encode())
for name in ("setup.py", "pyproject.toml"):
  digest.update((root / name).read_bytes())
print(digest.hexdigest())
PYTHON_CODE
}

# prepare_environment [EXTRA]: afterwards "$RUN" runs instructjax of this checkout.
prepare_environment() {
  local extra="${1:-}" python stamp stamp_file target
  if [[ -n "${INSTRUCTJAX_PYTHON:-}" ]]; then
    "$RUN" -c 'import sys; from importlib.util import find_spec
sys.exit(None in map(find_spec, ("jax", "flax", "orbax", "grain", "ml_collections")))' \
      >/dev/null 2>&1 || fail \
      "INSTRUCTJAX_PYTHON=$RUN does not run, or lacks what instructjax needs." \
      "Install it there (pip install $ROOT), or unset INSTRUCTJAX_PYTHON to have it made."
    return
  fi
  stamp_file="$VENV/.instructjax${extra:+-$extra}"
  target="$ROOT${extra:+[$extra]}"
  if ! python_works "$VENV/bin/python"; then
    if [[ -e "$VENV" && ! -f "$VENV/pyvenv.cfg" && -n "$(ls -A "$VENV" 2>/dev/null)" ]]; then
      fail "$VENV exists and is no virtual environment." \
        "Remove it, or set INSTRUCTJAX_VENV to another place."
    fi
    python="$(find_python)"
    printf 'Making a virtual environment in %s with %s\n' "$VENV" "$("$python" --version 2>&1)"
    "$python" -m venv --clear "$VENV"
  fi
  stamp="$(install_stamp)"
  if [[ -f "$stamp_file" && "$(<"$stamp_file")" == "$stamp" ]]; then
    return
  fi
  printf 'Installing instructjax and what it needs (some minutes the first time)\n'
  "$VENV/bin/python" -m pip install --disable-pip-version-check --quiet --editable "$target" || fail \
    "The installation failed; pip's message is above. It needs the package index or a mirror." \
    "Run the same command again once that is mended: what was downloaded is kept."
  printf '%s\n' "$stamp" >"$stamp_file"
  # An extra brings the plain installation with it.
  printf '%s\n' "$stamp" >"$VENV/.instructjax"
}

# keep_memory: on a CPU each step takes large blocks of memory and returns them; by default glibc
# hands them back to the system, and getting them again page by page costs up to a quarter of the
# time, on some virtual machines more than the step itself. One arena for all threads, since the
# arenas of other threads than the first have no room for large blocks and map each anew. Settings
# of one's own in GLIBC_TUNABLES stand.
keep_memory() {
  local tunables="glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1"
  tunables+=":glibc.malloc.mmap_threshold=8589934592:glibc.malloc.trim_threshold=17179869184"
  tunables+=":glibc.malloc.top_pad=1073741824"
  export GLIBC_TUNABLES="${GLIBC_TUNABLES:-$tunables}"
}
