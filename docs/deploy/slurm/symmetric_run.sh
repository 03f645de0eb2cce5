#!/bin/bash
# The same with `ray symmetric-run` of Ray 2.49 or newer, which waits for all hosts, and ends them.
#SBATCH --job-name=fedraclora
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=01:00:00
# It ends with `ray stop`, which ends every Ray of yours on a host, that of another job, too.
#SBATCH --exclusive
set -euo pipefail
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 RAY_USAGE_STATS_ENABLED=0
# A token of this job: else whoever reaches a port of these hosts runs code as you.
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
ip=$(srun --nodes=1 --ntasks=1 --overlap --nodelist="$head" hostname --ip-address)
address=$ip:$((20000 + SLURM_JOB_ID % 20000))
srun --ntasks-per-node=1 ray symmetric-run --address "$address" --min-nodes "$SLURM_JOB_NUM_NODES" \
  --num-cpus "${SLURM_CPUS_PER_TASK:-1}" -- \
  fedraclora simulate engine=ray engine.address="$address" "$@"
