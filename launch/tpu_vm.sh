#!/usr/bin/env bash
# TPU VMs by queued resources: one slice or several, on demand or spot, restarted after preemption.
#
#   export PROJECT=... ZONE=us-west4-a NAME=uwco TYPE=v5litepod-256 BUCKET=my-bucket
#   launch/tpu_vm.sh keep --config=configs/uwco.py:paper --workdir=/runs/uwco ...   # all of the below, until finished
#
#   launch/tpu_vm.sh create     asks for the hosts          launch/tpu_vm.sh status
#   launch/tpu_vm.sh wait       until they are there        launch/tpu_vm.sh ssh 'COMMAND'   on every host
#   launch/tpu_vm.sh setup      copies and installs this checkout, mounts BUCKET as /runs
#   launch/tpu_vm.sh run ARGUMENTS of elasticdit_jax.main   in the foreground, output of all hosts
#   launch/tpu_vm.sh stop       saves and stops             launch/tpu_vm.sh delete          ends the bill
#
# Also: SLICES=2 (multislice), SPOT=0 (default 1), VERSION (runtime; found by TYPE), SERVICE_ACCOUNT.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
slices=${SLICES:-1}
name=${NAME:-}

need() {
  local variable
  for variable in "$@"; do
    if [[ -z ${!variable:-} ]]; then
      echo "launch/tpu_vm.sh: set $variable, for example: export $variable=..." >&2
      exit 2
    fi
  done
}

tpus() { gcloud compute tpus "$@" --project="$PROJECT" --zone="$ZONE" --quiet; }

runtime() {
  case $TYPE in
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) echo tpu-ubuntu2204-base ;;
  esac
}

nodes() {
  if ((slices == 1)); then
    echo "$name"
  else
    seq -f "$name-%g" 0 $((slices - 1))
  fi
}

create() {
  local flags=(--accelerator-type="$TYPE" --runtime-version="${VERSION:-$(runtime)}")
  if ((slices == 1)); then
    flags+=(--node-id="$name")
  else
    flags+=(--node-count="$slices" --node-prefix="$name")
  fi
  if ((${SPOT:-1})); then flags+=(--spot); fi
  if [[ -n ${SERVICE_ACCOUNT:-} ]]; then flags+=(--service-account="$SERVICE_ACCOUNT"); fi
  tpus queued-resources create "$name" "${flags[@]}"
}

state() { tpus queued-resources describe "$name" --format='value(state.state)' 2>/dev/null || echo NONE; }

wait_for_hosts() {
  local now
  while now=$(state) && [[ $now != ACTIVE ]]; do
    case $now in
      FAILED | SUSPENDED | SUSPENDING | NONE)
        echo "launch/tpu_vm.sh: $name is $now" >&2
        return 1
        ;;
    esac
    echo "$(date +%T) $name is $now"
    sleep "${POLL_SECONDS:-30}"
  done
}

# on_all COMMAND: on every host of every slice at once; fails where one fails.
on_all() {
  local node code=0 pids=()
  for node in $(nodes); do
    tpus tpu-vm ssh "$node" --worker=all --command="$1" &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
  return "$code"
}

setup() {
  local archive node
  archive=$(mktemp -d)/elasticdit_jax.tar.gz
  tar -C "$root" --exclude-vcs --exclude='.venv*' --exclude=./runs --exclude=__pycache__ -czf "$archive" .
  for node in $(nodes); do
    tpus tpu-vm scp "$archive" "$node":/tmp/elasticdit_jax.tar.gz --worker=all
  done
  rm -r "$(dirname "$archive")"
  on_all "set -e
    mkdir -p ~/elasticdit_jax && tar -xzf /tmp/elasticdit_jax.tar.gz -C ~/elasticdit_jax
    bash ~/elasticdit_jax/launch/tpu_vm_host.sh '$BUCKET'"
}

run() {
  local slots
  printf -v slots ' %q' "$@"
  on_all "cd ~/elasticdit_jax && PYTHON=~/.venv-elasticdit/bin/python launch/train.sh$slots"
}

remove() { tpus queued-resources delete "$name" --force || true; }

# keep ARGUMENTS: creates, sets up and runs until the run says that it is finished, or that a restart cannot help.
keep() {
  local log codes
  log=$(mktemp)
  if [[ $(state) == NONE ]]; then create; fi
  while :; do
    # From here on a failure may be one of the network: the next round tries again.
    if [[ $(state) == NONE ]]; then create || true; fi
    if wait_for_hosts && setup; then
      run "$@" 2>&1 | tee "$log" || true
      codes=$(sed -nE 's/.*launch\/train\.sh on .*: exit code ([0-9]+).*/\1/p' "$log" | sort -nu | tr '\n' ' ')
      echo "$(date +%T) exit codes of the hosts: ${codes:-none}"
      if [[ $codes == "0 " ]]; then break; fi
      if [[ " $codes" == *" 2 "* ]]; then
        rm "$log"
        exit 2
      fi
    fi
    # A preempted slice never comes back: its queued resource is SUSPENDED until it is deleted.
    if [[ $(state) != ACTIVE ]]; then remove; fi
    sleep "${POLL_SECONDS:-30}"
  done
  rm "$log"
  remove
}

need PROJECT ZONE NAME
command=${1:-}
if (($#)); then shift; fi
case $command in
  create) need TYPE && create ;;
  status) state ;;
  wait) wait_for_hosts ;;
  setup) need BUCKET && setup ;;
  run) run "$@" ;;
  keep) need TYPE BUCKET && keep "$@" ;;
  ssh) on_all "$1" ;;
  # The brackets keep the pattern from matching the shell that runs this very line.
  stop) on_all "pkill -TERM -f 'launch/[t]rain.sh' || true" ;;
  delete) remove ;;
  *)
    sed -n '2,/^set -/p' "${BASH_SOURCE[0]}" | sed '$d; s/^# \{0,1\}//' >&2
    exit 2
    ;;
esac
