#!/usr/bin/env bash
# A run on a TPU VM pod: asks for it, installs, runs on all workers, starts again when it is lost.
#
#   bash launch/tpu.sh COMMAND [--dry_run] [--config=FILE --workdir=DIR and other flags of
#     python -m instructjax]
#
#   create   puts the request in the queue and waits until the pod is there
#   setup    copies this checkout (the files of git's HEAD) to all workers and installs it
#   run      runs the recipe on all workers; where it ends with an error it looks at the pod, makes
#            it anew if it is gone, and goes on, up to MAX_RESTARTS times, but not where it fails
#            three times in a row within QUICK_SECONDS (default 120)
#   all      create, setup and run
#   delete   gives the pod back
#
#   PROJECT ZONE TPU_NAME         of the pod
#   ACCELERATOR_TYPE              as in v5p-16; the word after the generation is its size
#   RUNTIME_VERSION               image of the TPU VM, as in v2-alpha-tpuv5
#   SPOT=1                        ask for a spot pod
#   MOUNT_COMMAND                 run on each worker before the recipe, to mount what DIR is on:
#                                 it must be one file system for all workers
#   MAX_RESTARTS (default 20)     WAIT_SECONDS between two looks at the queue (default 30)
#   SILENCE_SECONDS (default 100) after how long a silent worker is dead
set -euo pipefail

# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
# shellcheck source=launch/commands.sh
source "$ROOT/launch/commands.sh"

command="${1:-}"
[[ "$command" =~ ^(create|setup|run|all|delete)$ ]] || fail \
  "the first word is '$command': create, setup, run, all or delete (see the head of this file)."
shift
if [[ "${1:-}" == --dry_run ]]; then
  DRY_RUN=1
  shift
fi
need PROJECT "the cloud project that pays" my-project
need ZONE "the zone of the pod" us-east5-a
need TPU_NAME "the name of the pod" instructjax
case "$command" in
  create | run | all)
    need ACCELERATOR_TYPE "kind and size of the pod" v5p-16
    need RUNTIME_VERSION "image of the TPU VM" v2-alpha-tpuv5
    ;;
esac
case "$command" in run | all) need_flags "$@" ;; esac
where=("--project=${PROJECT}" "--zone=${ZONE}")

state() {
  gcloud compute tpus queued-resources describe "$TPU_NAME" "${where[@]}" \
    '--format=value(state.state)' 2>/dev/null || printf 'NONE\n'
}

create() {
  local now request
  request=(gcloud compute tpus queued-resources create "$TPU_NAME" "--node-id=$TPU_NAME" "${where[@]}"
    "--accelerator-type=$ACCELERATOR_TYPE" "--runtime-version=$RUNTIME_VERSION")
  if [[ -n "${SPOT:-}" ]]; then request+=(--spot); fi
  if [[ -n "$DRY_RUN" ]]; then
    show "${request[@]}"
    return
  fi
  now="$(state)"
  if [[ "$now" =~ ^(SUSPENDED|SUSPENDING|FAILED)$ ]]; then
    printf 'tpu.sh: the pod is %s; it is given back and asked for again\n' "$now"
    delete
    now=NONE
  fi
  if [[ "$now" == NONE ]]; then "${request[@]}"; fi
  until now="$(state)" && [[ "$now" == ACTIVE ]]; do
    [[ "$now" =~ ^(SUSPENDED|FAILED)$ ]] && fail "the request for $TPU_NAME is $now; see gcloud" \
      "compute tpus queued-resources describe $TPU_NAME ${where[*]}"
    printf 'tpu.sh: %s is %s\n' "$TPU_NAME" "$now"
    sleep "${WAIT_SECONDS:-30}"
  done
}

delete() {
  perform gcloud compute tpus queued-resources delete "$TPU_NAME" "${where[@]}" --force --quiet
}

on_all() {
  perform gcloud compute tpus tpu-vm ssh "$TPU_NAME" "${where[@]}" --worker=all "--command=$1"
}

setup() {
  local archive
  archive="${TMPDIR:-/tmp}/instructjax-$$.tar.gz"
  perform git -C "$ROOT" archive --format=tar.gz "--output=$archive" HEAD
  perform gcloud compute tpus tpu-vm scp "$archive" "$TPU_NAME:instructjax.tar.gz" "${where[@]}" \
    --worker=all
  if [[ -z "$DRY_RUN" ]]; then rm -f "$archive"; fi
  on_all "mkdir -p instructjax && tar -xzf instructjax.tar.gz -C instructjax && cd instructjax && \
bash -c 'source launch/environment.sh && prepare_environment tpu'"
}

# One attempt. The lock, which a process that was killed does not keep, lets a new attempt wait for
# what is left of the one before on a worker.
attempt() {
  local line
  line="$(show .venv/bin/python -m instructjax --distributed --preflight=first \
    "--silence_seconds=${SILENCE_SECONDS:-100}" "$@")"
  on_all "${MOUNT_COMMAND:+$MOUNT_COMMAND && }cd instructjax && flock /tmp/instructjax.lock $line"
}

run() {
  local restarts=0 quick=0 began=0
  if [[ -n "$DRY_RUN" ]]; then
    attempt "$@"
    return
  fi
  while began=$SECONDS && ! attempt "$@"; do
    restarts=$((restarts + 1))
    ((restarts <= ${MAX_RESTARTS:-20})) || fail "the run failed $restarts times; it can be" \
      "started again with the same command."
    # What fails at once on a pod that is there is no lost machine.
    if ((SECONDS - began < ${QUICK_SECONDS:-120})) && [[ "$(state)" == ACTIVE ]]; then
      quick=$((quick + 1))
    else
      quick=0
    fi
    ((quick < 3)) || fail "the run failed three times in a row as soon as it had begun: see above."
    printf 'tpu.sh: restart %d of at most %d\n' "$restarts" "${MAX_RESTARTS:-20}"
    sleep "${WAIT_SECONDS:-30}"
    if [[ "$(state)" != ACTIVE ]]; then
      create
      setup
    fi
  done
}

case "$command" in
  create) create ;;
  setup) setup ;;
  run) run "$@" ;;
  delete) delete ;;
  all)
    create
    setup
    run "$@"
    ;;
esac
