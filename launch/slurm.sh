#!/usr/bin/env bash
# A run under SLURM: one task for each GPU (or one for each CPU node), one job.
#
#   sbatch --nodes=N [--gpus-per-node=G --ntasks-per-node=G] [options of sbatch] launch/slurm.sh \
#     --config=FILE --workdir=DIR [flags of python -m instructjax]
#   bash launch/slurm.sh --dry_run --config=FILE --workdir=DIR       prints what a node would do
#
# Call it from the checkout, which all nodes must see, as they must DIR. Three minutes before the
# time limit all tasks save and leave, and the job is queued again; it goes on where it was. The
# same after a node has failed. A run that fails by itself ends the job with its error.
#
#   INSTRUCTJAX_PYTHON   an interpreter with instructjax (else .venv of the checkout, made before:
#                        compute nodes often cannot download)
#   SILENCE_SECONDS      after how long a silent task is dead (default 100)
#   SAVE_SECONDS         what the tasks have to save before the job is queued again (default 120)
#
#SBATCH --job-name=instructjax
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=instructjax-%j.log
set -euo pipefail

# sbatch runs a copy of this file, so the checkout is where it was called.
checkout="${SLURM_SUBMIT_DIR:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}"
if [[ ! -f "$checkout/launch/environment.sh" ]]; then
  printf 'no launch/environment.sh in %s: call sbatch in the checkout of instructjax\n' \
    "$checkout" >&2
  exit 1
fi
# shellcheck source=launch/environment.sh
source "$checkout/launch/environment.sh"
# shellcheck source=launch/commands.sh
source "$ROOT/launch/commands.sh"

if [[ "${1:-}" == --dry_run ]]; then
  DRY_RUN=1
  shift
fi
need_flags "$@"
cd "$ROOT"
if [[ -z "$DRY_RUN" ]]; then
  need SLURM_JOB_ID "this script runs under SLURM; see sbatch in its first lines" 1
  [[ -x "$RUN" ]] || fail "$RUN is not there: run launch/quickstart.sh once where packages can be" \
    "installed, or set INSTRUCTJAX_PYTHON."
  # JAX gives each task the one GPU of its number, so the others of a node would stay idle.
  gpus="${SLURM_GPUS_ON_NODE:-0}" tasks="${SLURM_NTASKS_PER_NODE:-1}"
  if [[ "$gpus" =~ ^[0-9]+$ ]] && ((gpus > 0 && gpus != tasks)); then
    fail "$gpus GPUs and $tasks tasks on a node: each task drives one GPU." \
      "Call sbatch with --ntasks-per-node=$gpus."
  fi
fi

step=(
  srun --kill-on-bad-exit=1 "$RUN" -m instructjax --distributed --preflight=first
  "--silence_seconds=${SILENCE_SECONDS:-100}" "$@")
if [[ -n "$DRY_RUN" ]]; then
  show "${step[@]}"
  exit
fi

stopping=""
# shellcheck disable=SC2329  # called by the trap below
stop() {
  stopping=1
  printf 'slurm.sh: the time is nearly up; all tasks are asked to save and leave\n'
  scancel --signal=TERM "$SLURM_JOB_ID.0"
}
trap stop USR1

"${step[@]}" &
child="$!" code=0
wait "$child" || code=$?
if [[ -n "$stopping" ]]; then
  # The signal ended `wait`; the step is still there. What does not save in time, as a stage that
  # samples, has nothing to lose but its time.
  deadline=$((SECONDS + ${SAVE_SECONDS:-120}))
  while kill -0 "$child" 2>/dev/null && ((SECONDS < deadline)); do sleep 0.5; done
  code=0
  if ! kill -0 "$child" 2>/dev/null; then wait "$child" || code=$?; fi
  if ((code == 0)); then
    printf 'slurm.sh: the job is queued again\n'
    exec scontrol requeue "$SLURM_JOB_ID"
  fi
fi
exit "$code"
