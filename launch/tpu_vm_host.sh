#!/usr/bin/env bash
# On every TPU VM host: installs the checkout beside this script, and mounts a bucket as /runs. Safe to run again.
#
#   bash launch/tpu_vm_host.sh BUCKET
set -euo pipefail

bucket=$1
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export DEBIAN_FRONTEND=noninteractive

if ! command -v gcsfuse >/dev/null; then
  key=/usr/share/keyrings/cloud.google.asc
  curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$key" >/dev/null
  echo "deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  sudo apt-get -o DPkg::Lock::Timeout=300 -qq update
  sudo apt-get -o DPkg::Lock::Timeout=300 -qq install -y gcsfuse
fi
if ! mountpoint -q /runs; then
  sudo mkdir -p /runs
  sudo chown "$USER" /runs
  gcsfuse --implicit-dirs "$bucket" /runs
fi

python=python3
if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  # Runtimes with an older Python: a newer one of its own.
  command -v uv >/dev/null || python3 -m pip install -q --user uv
  PATH=$HOME/.local/bin:$PATH
  uv python install -q 3.11
  python=$(uv python find 3.11)
fi
[[ -d ~/.venv-elasticdit ]] || "$python" -m venv ~/.venv-elasticdit
~/.venv-elasticdit/bin/pip install -q -e "${checkout}[tpu]"
