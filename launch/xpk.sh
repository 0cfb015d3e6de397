#!/usr/bin/env bash
# One command with XPK (pip install xpk), on a GKE cluster that `xpk cluster create` made.
#
#   export CLUSTER=... PROJECT=... ZONE=us-west4-a NAME=uwco TYPE=v5litepod-256 IMAGE=REGION-docker.pkg.dev/...
#   launch/xpk.sh --config=configs/uwco.py:paper --workdir=/runs/uwco ...
#
# SLICES=2 for multislice; STORAGE names a storage attached with `xpk storage attach` and mounted as /runs; further
# flags of XPK go into EXTRA: EXTRA=--dry-run shows what would happen.
set -euo pipefail

: "${CLUSTER:?}" "${PROJECT:?}" "${ZONE:?}" "${NAME:?}" "${TYPE:?}" "${IMAGE:?}"
printf -v command ' %q' /app/launch/train.sh "$@"
flags=(
  --cluster="$CLUSTER" --project="$PROJECT" --zone="$ZONE" --workload="$NAME"
  --tpu-type="$TYPE" --num-slices="${SLICES:-1}" --docker-image="$IMAGE"
  # Every preemption is a restart. XPK restarts after 42 and 127 to 255 (a signal); 75 means "saved, go on"
  # (launch/train.sh), 1 an error that Python reported, such as a lost host; 2, a wrong command, stays final.
  --max-restarts=1000 --restart-on-exit-codes="1,75" --termination-grace-period-seconds=120
)
if [[ -n ${STORAGE:-} ]]; then flags+=(--storage="$STORAGE"); fi
# shellcheck disable=SC2086  # EXTRA holds several words
exec xpk workload create "${flags[@]}" --command="${command# }" ${EXTRA:-}
