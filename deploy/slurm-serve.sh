#!/bin/bash
# Serve in an allocation of one node: sbatch deploy/slurm-serve.sh model=llava gpus=1
# The keys of the endpoint are in BRIDGEWORK_API_KEYS, which sbatch passes on.
#SBATCH --job-name=bridgework-serve
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --exclusive
#SBATCH --time=24:00:00
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?start it with sbatch, from the repository}"
source .venv/bin/activate
export RAY_AUTH_MODE=token BRIDGEWORK_HOME="${BRIDGEWORK_HOME:-$PWD/.bridgework}"
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun ray symmetric-run --address "$head:6379" -- env RAY_ADDRESS="$head:6379" bridgework serve chat "$@"
