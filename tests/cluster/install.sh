#!/usr/bin/env bash
# Installs Debian's Slurm and munge for the tests in tests/cluster: programs only, no daemon is set up or started.
# Ends with 1 and the reason where that cannot be done; what is there already is left alone.
set -uo pipefail

no() {
    echo "NO SLURM: $1; the tests in tests/cluster are skipped" >&2
    exit 1
}

PATH=$PATH:/usr/sbin:/sbin
missing=()
for program in munged slurmctld slurmd srun sbatch scontrol; do
    command -v "$program" > /dev/null || missing+=("$program")
done
[ ${#missing[@]} -eq 0 ] && exit 0
[ "$(id -u)" -eq 0 ] || no "${missing[*]} missing, and installing needs root"
command -v apt-get > /dev/null || no "${missing[*]} missing, and there is no apt-get"

export DEBIAN_FRONTEND=noninteractive
# Packages start their daemons when they are installed, where there is an init system that obeys.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' > "$policy"
    chmod 755 "$policy"
    trap 'rm -f "$policy"' EXIT
fi
packages() {
    timeout 300 apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge
}
log=$(timeout 120 apt-get update -qq 2>&1; packages 2>&1) || no "apt-get failed: $(tail -n 1 <<< "$log")"
