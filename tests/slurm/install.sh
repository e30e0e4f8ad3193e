#!/usr/bin/env bash
# Installs Debian's Slurm and munge where they are missing. Nothing is started: the tests bring their own configuration.
set -euo pipefail
if command -v slurmctld >/dev/null && command -v slurmd >/dev/null && command -v munged >/dev/null; then
    exit 0
fi
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "error: slurmctld, slurmd and munged are missing: install slurm-wlm and munge as root (Debian, Ubuntu)" >&2
    exit 2
fi
export DEBIAN_FRONTEND=noninteractive
# RUNLEVEL=1 keeps the packages' own services from being started where nothing else does (policy-rc.d)
apt-get update -qq
RUNLEVEL=1 apt-get install -y -qq --no-install-recommends slurm-wlm slurm-client munge >/dev/null
