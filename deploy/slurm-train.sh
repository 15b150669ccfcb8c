#!/bin/bash
# Train in an allocation: sbatch deploy/slurm-train.sh llava --run mine --workers 8
# The same run id resumes, so a requeued job loses the steps since the last checkpoint.
#SBATCH --job-name=bridgework
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?start it with sbatch, from the repository}"
source .venv/bin/activate
export RAY_AUTH_MODE=token BRIDGEWORK_HOME="${BRIDGEWORK_HOME:-$PWD/.bridgework}"
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=600
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# RAY_ADDRESS: the command on the head joins this Ray instead of starting its own.
srun ray symmetric-run --address "$head:6379" --min-nodes "$SLURM_JOB_NUM_NODES" -- \
  env RAY_ADDRESS="$head:6379" bridgework train "$@"
