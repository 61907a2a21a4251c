# shellcheck shell=bash
# Sourced by the scripts beside it, after environment.sh: --dry_run, and variables that must be set.

DRY_RUN=""

# show WORD...: a command as a line that a shell would read back.
show() {
  local line
  printf -v line '%q ' "$@"
  printf '%s\n' "${line% }"
}

# perform WORD...: runs a command, or only prints it with --dry_run.
perform() {
  if [[ -n "$DRY_RUN" ]]; then
    show "$@"
  else
    "$@"
  fi
}

# need NAME MEANING EXAMPLE: stops where the variable NAME is unset or empty.
need() {
  [[ -n "${!1:-}" ]] || fail "$1 is not set: $2." "Set it in the environment, as in $1=$3."
}

# flag NAME WORD...: the value of the last --NAME=value among the words, or nothing.
flag() {
  local name="$1" word value=""
  shift
  for word in "$@"; do
    if [[ "$word" == "--$name="* ]]; then value="${word#*=}"; fi
  done
  printf '%s\n' "$value"
}

# need_flags WORD...: stops where --config or --workdir is not among the words.
need_flags() {
  local name
  for name in config workdir; do
    [[ -n "$(flag "$name" "$@")" ]] || fail \
      "--$name=... is missing: give the flags of python -m instructjax after those of the script."
  done
}
