#!/usr/bin/env bash
# A run on this machine, in one process or in several that act as one job.
#
#   bash launch/local.sh [--processes N] [--devices D] [--grace_seconds S] [--dry_run] \
#     --config=FILE --workdir=DIR [flags of python -m instructjax]
#
#   --processes N      how many (default 1). Several are for CPUs: one process drives all GPUs or
#                      TPU chips of a machine. The first one's output is shown, that of the others
#                      is in DIR/logs/process-I.log.
#   --devices D        simulated CPU devices of each process (default 1, with --processes)
#   --grace_seconds S  once a process has failed, how long the others have to end by themselves
#                      before they are killed (default 15)
#
# Paths are relative to the checkout. SIGTERM or Ctrl-C: all save after the same step and leave; a second one kills them.
set -euo pipefail

# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
# shellcheck source=launch/commands.sh
source "$ROOT/launch/commands.sh"

processes=1 devices=1 grace=15
while (($#)); do
  case "$1" in
    --processes | --devices | --grace_seconds)
      [[ "${2:-}" =~ ^[1-9][0-9]*$ ]] || fail "$1 ${2:-}: give a whole number from 1 on."
      case "$1" in
        --processes) processes="$2" ;;
        --devices) devices="$2" ;;
        *) grace="$2" ;;
      esac
      shift 2
      ;;
    --dry_run) DRY_RUN=1 && shift ;;
    --) shift && break ;;
    *) break ;;
  esac
done
need_flags "$@"
if [[ -z "$DRY_RUN" ]]; then prepare_environment; fi
keep_memory
cd "$ROOT"

program=("$RUN" -m instructjax "$@")
if ((processes == 1)); then
  if [[ -n "$DRY_RUN" ]]; then
    show "${program[@]}"
    exit
  fi
  exec "${program[@]}"
fi

logs="$(flag workdir "$@")/logs"
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$devices"
if [[ -n "$DRY_RUN" ]]; then
  port=PORT
else
  port="$("$RUN" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0))
print(s.getsockname()[1])')"
  mkdir -p "$logs"
fi
program+=("--coordinator=127.0.0.1:$port" "--processes=$processes")

pids=()
if [[ -n "$DRY_RUN" ]]; then
  for ((i = 0; i < processes; i++)); do
    show env "JAX_PLATFORMS=$JAX_PLATFORMS" "XLA_FLAGS=$XLA_FLAGS" \
      "${program[@]}" "--process_id=$i"
  done
  exit
fi
for ((i = 0; i < processes; i++)); do
  if ((i == 0)); then
    "${program[@]}" --process_id=0 &
  else
    "${program[@]}" "--process_id=$i" >"$logs/process-$i.log" 2>&1 &
  fi
  pids+=("$!")
done

signal_all() {
  local pid
  for pid in "${pids[@]}"; do kill "-$1" "$pid" 2>/dev/null || true; done
}
stops=0
# shellcheck disable=SC2329  # called by the trap below
stop() {
  stops=$((stops + 1))
  if ((stops == 1)); then
    printf 'local.sh: all are asked to save and leave; again to kill them\n' >&2
    signal_all TERM
  else
    signal_all KILL
  fi
}
trap stop INT TERM

# Looks at each in turn: `wait -n` is not in the bash of macOS.
status=0 deadline=0 running="$processes"
ended=()
while ((running)); do
  sleep 0.3
  for ((i = 0; i < processes; i++)); do
    if [[ -n "${ended[i]:-}" ]] || kill -0 "${pids[i]}" 2>/dev/null; then continue; fi
    code=0
    wait "${pids[i]}" || code=$?
    ended[i]="$code" running=$((running - 1))
    if ((code && !status)); then
      status="$code" deadline=$((SECONDS + grace))
      printf 'local.sh: process %d ended with status %d\n' "$i" "$code" >&2
      if ((i)); then tail -n 20 "$logs/process-$i.log" >&2; fi
    fi
  done
  if ((status && running && SECONDS >= deadline)); then
    printf 'local.sh: the others had %d s to end and are killed\n' "$grace" >&2
    signal_all KILL
    deadline=$((SECONDS + 3600))
  fi
done
exit "$status"
