#!/usr/bin/env bash
# What every launcher starts on every host: sets the environment, trains, and says by its exit code what to do next.
#
#   launch/train.sh --config=configs/uwco.py:paper --workdir=/runs/uwco ...
#
#   0   the run is finished
#   2   the command or the data is wrong; the same command again would fail again
#   75  stopped by SIGTERM (preemption, maintenance, time limit) after saving, or another host did not answer in time;
#       the same command again goes on
#   any other: a host or a chip was lost; the same command again goes on from the last checkpoint
#
# The training process itself leaves with 0 after SIGTERM, which a scheduler would take for a finished run.
set -uo pipefail

export PYTHONUNBUFFERED=1
# Compiled programs outlive a restart where this is a directory of the shared disk.
if [[ -n ${ELASTICDIT_CACHE:-} ]]; then export JAX_COMPILATION_CACHE_DIR=$ELASTICDIT_CACHE; fi

stopped=0
child=
# shellcheck disable=SC2329  # called by the trap
stop() {
  stopped=1
  if [[ -n $child ]]; then kill -TERM "$child" 2>/dev/null; fi
}
trap stop TERM INT

"${PYTHON:-python3}" -m elasticdit_jax.main "$@" &
child=$!
# A signal that came before the child was there.
if ((stopped)); then kill -TERM "$child" 2>/dev/null; fi
while :; do
  wait "$child"
  code=$?
  # A trapped signal ends `wait`, not the child.
  kill -0 "$child" 2>/dev/null || break
done
if ((stopped && (code == 0 || code == 143))); then code=75; fi
echo "launch/train.sh on $(hostname): exit code $code"
exit "$code"
