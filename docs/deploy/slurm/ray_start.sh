#!/bin/bash
# A run over the hosts of a Slurm job: sbatch ray_start.sh rounds=20 method.rank=8
#SBATCH --job-name=fedraclora
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=01:00:00
set -euo pipefail
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 RAY_USAGE_STATS_ENABLED=0
# A token of this job: else whoever reaches a port of these hosts runs code as you.
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
ip=$(srun --nodes=1 --ntasks=1 --overlap --nodelist="$head" hostname --ip-address)
port=$((20000 + SLURM_JOB_ID % 20000))
cpus=${SLURM_CPUS_PER_TASK:-1}
folder=$(mktemp -d)
trap 'jobs -p | xargs -r kill; wait; rm -rf "$folder"' EXIT

srun --nodes=1 --ntasks=1 --overlap --nodelist="$head" \
  ray start --head --block --node-ip-address="$ip" --port="$port" --num-cpus="$cpus" --include-dashboard=false &
until srun --nodes=1 --ntasks=1 --overlap --nodelist="$head" \
  ray status --address="$ip:$port" > "$folder/status" 2>&1; do sleep 2; done
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
  srun --nodes=$((SLURM_JOB_NUM_NODES - 1)) --ntasks-per-node=1 --overlap --exclude="$head" \
    ray start --block --address="$ip:$port" --num-cpus="$cpus" &
fi
# This script runs on the head. Where a host joins late, the run begins without it.
fedraclora simulate engine=ray engine.address="$ip:$port" "$@"
