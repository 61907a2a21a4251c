#!/usr/bin/env bash
# The image that launch/gke.sh runs.
#
#   bash launch/docker.sh build [--dry_run]
#   bash launch/docker.sh push [--dry_run]
#   bash launch/docker.sh run [--dry_run] --config=FILE --workdir=DIR [flags]     on this machine
#
#   IMAGE       the name to build, with its registry and tag
#   BASE_IMAGE  what it builds upon: an image with Python 3.11 to 3.13
#   EXTRA       tpu, gpu, or nothing for CPUs
#   RUNS        for `run`: a directory of this machine, mounted at /runs, where DIR is
set -euo pipefail

# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
# shellcheck source=launch/commands.sh
source "$ROOT/launch/commands.sh"

command="${1:-}"
[[ "$command" =~ ^(build|push|run)$ ]] || fail \
  "the first word is '$command': build, push or run (see the head of this file)."
shift
if [[ "${1:-}" == --dry_run ]]; then
  DRY_RUN=1
  shift
fi
need IMAGE "the name of the image" REGISTRY/instructjax:TAG

case "$command" in
  build)
    need BASE_IMAGE "an image with Python 3.11 to 3.13 to build upon" python:3.12-slim
    [[ "${EXTRA:-}" =~ ^(|tpu|gpu)$ ]] || fail "EXTRA=$EXTRA is none of tpu, gpu, nothing."
    perform docker build "--file=$ROOT/launch/Dockerfile" "--build-arg=BASE_IMAGE=$BASE_IMAGE" \
      "--build-arg=EXTRA=${EXTRA:-}" "--tag=$IMAGE" "$ROOT"
    ;;
  push) perform docker push "$IMAGE" ;;
  run)
    need RUNS "a directory of this machine for the runs" "$PWD/runs"
    need_flags "$@"
    perform docker run --rm "--volume=$RUNS:/runs" "$IMAGE" "$@"
    ;;
esac
