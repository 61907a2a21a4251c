#!/usr/bin/env bash
# A run on Kubernetes, as a JobSet (jobset.sigs.k8s.io): TPU slices and GPU nodes of GKE.
#
#   bash launch/gke.sh COMMAND [--dry_run] [--config=FILE --workdir=DIR and other flags of
#     python -m instructjax]
#
#   print    writes the manifest to the standard output
#   submit   hands it to the cluster that kubectl knows (--dry_run: prints it instead)
#   logs     follows the first pod
#   delete   ends the job: its pods save and leave
#
#   NAME              of the job, also of its pods
#   IMAGE             what launch/docker.sh has built and pushed
#   HOSTS             how many pods; for a TPU slice as many as it has hosts
#   CLAIM             a claim of a volume that all pods can write to (ReadWriteMany); it is mounted
#                     at MOUNT (default /runs), and DIR is in it
#   TPU_ACCELERATOR   for TPUs: kind of the node pool, as in tpu-v5p-slice, with
#   TPU_TOPOLOGY        its topology, as in 2x2x4, and
#   TPUS_PER_HOST       the chips of a host, as in 4
#   GPUS_PER_HOST     for GPU nodes instead; neither: for CPU nodes
#   MAX_RESTARTS (default 20)   PORT of the coordinator (default 8476)
#   SILENCE_SECONDS (default 100): after how long a silent pod is dead
#
# The restarts of a JobSet begin all pods anew; the run goes on from its last checkpoint.
# shellcheck disable=SC2153  # the variables in capitals come from the environment
set -euo pipefail

# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
# shellcheck source=launch/commands.sh
source "$ROOT/launch/commands.sh"

command="${1:-}"
[[ "$command" =~ ^(print|submit|logs|delete)$ ]] || fail \
  "the first word is '$command': print, submit, logs or delete (see the head of this file)."
shift
if [[ "${1:-}" == --dry_run ]]; then
  DRY_RUN=1
  shift
fi
need NAME "the name of the job" instructjax

# quoted TEXT: as a YAML (and JSON) string.
quoted() {
  local text="${1//\\/\\\\}"
  printf '"%s"' "${text//\"/\\\"}"
}

# listed WORD...: as a YAML list of strings on one line.
listed() {
  local word separator="" line=""
  for word in "$@"; do
    line+="$separator$(quoted "$word")"
    separator=", "
  done
  printf '[%s]' "$line"
}

manifest() {
  local text name selector="{}" limits="{}"
  need IMAGE "the image of launch/docker.sh" REGISTRY/instructjax:TAG
  need HOSTS "the number of pods" 4
  need CLAIM "the claim of a volume that all pods can write to" runs
  need_flags "$@"
  [[ "$HOSTS" =~ ^[1-9][0-9]*$ ]] || fail "HOSTS=$HOSTS is no number of pods."
  local MAX_RESTARTS="${MAX_RESTARTS:-20}" MOUNT="${MOUNT:-/runs}" PORT="${PORT:-8476}"
  local program=(python -m instructjax --preflight=first
    "--silence_seconds=${SILENCE_SECONDS:-100}")
  if [[ -n "${TPU_ACCELERATOR:-}" ]]; then
    need TPU_TOPOLOGY "the topology of the slice" 2x2x4
    need TPUS_PER_HOST "the chips of a host" 4
    selector="{cloud.google.com/gke-tpu-accelerator: $(quoted "$TPU_ACCELERATOR")"
    selector+=", cloud.google.com/gke-tpu-topology: $(quoted "$TPU_TOPOLOGY")}"
    limits="{google.com/tpu: $TPUS_PER_HOST}"
    program+=(--distributed) # the node tells JAX who the others are
  else
    if [[ -n "${GPUS_PER_HOST:-}" ]]; then limits="{nvidia.com/gpu: $GPUS_PER_HOST}"; fi
    # Pods of a JobSet have names in its own subdomain; the first one is the coordinator.
    program+=("--coordinator=$NAME-worker-0-0.$NAME:$PORT" "--processes=$HOSTS"
      "--process_id=\$(JOB_COMPLETION_INDEX)")
  fi
  case "$(flag workdir "$@")" in
    "$MOUNT"/*) ;;
    *) fail "--workdir=$(flag workdir "$@") is not in $MOUNT, where the claim is mounted." ;;
  esac
  text="$(<"$ROOT/launch/jobset.yaml")"
  # shellcheck disable=SC2034  # all three are read by name below
  local LIMITS="$limits" NODE_SELECTOR="$selector" COMMAND
  # shellcheck disable=SC2034
  COMMAND="$(listed "${program[@]}" "$@")"
  for name in NAME IMAGE HOSTS CLAIM MAX_RESTARTS MOUNT PORT NODE_SELECTOR LIMITS COMMAND; do
    # Quoted inside, so that bash does not take an & for what was matched.
    text=${text//"\${$name}"/"${!name}"}
  done
  printf '%s\n' "$text"
}

case "$command" in
  print) manifest "$@" ;;
  submit)
    text="$(manifest "$@")"
    if [[ -n "$DRY_RUN" ]]; then
      printf '%s\n' "# kubectl apply --filename=- with:" "$text"
    else
      kubectl apply --filename=- <<<"$text"
    fi
    ;;
  logs) perform kubectl logs --follow "job/$NAME-worker-0" ;;
  delete) perform kubectl delete jobset "$NAME" ;;
esac
