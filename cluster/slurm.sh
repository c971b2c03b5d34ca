#!/usr/bin/env bash
# One run on nodes of a Slurm cluster: sbatch cluster/slurm.sh RECIPE [key=value ...], from the root of a checkout.
# The checkout, ~/venv (requirements/gpu.txt and c2f_ray) and the run's folder lie where all nodes see them.
# gpu: A100-80G
#SBATCH --job-name=c2f-ray
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@300
set -euo pipefail

START_TIMEOUT_S=300
export PATH="$HOME/venv/bin:$PATH"
export HF_HOME="${HF_HOME:-$PWD/.cache/hf}"

# A token of this job's own, which only its owner can read.
umask 077
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH="$PWD/.cache/ray-token-$SLURM_JOB_ID"
mkdir -p "$(dirname "$RAY_AUTH_TOKEN_PATH")"
trap 'rm -f "$RAY_AUTH_TOKEN_PATH"' EXIT
od -An -N32 -tx1 /dev/urandom | tr -d ' \n' > "$RAY_AUTH_TOKEN_PATH"

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
on_node() { srun --overlap --nodes=1 --ntasks=1 --nodelist="$1" "${@:2}"; }
head_ip=$(on_node "${nodes[0]}" hostname --ip-address | awk '{print $1}')
port=$((20000 + SLURM_JOB_ID % 10000))
export RAY_ADDRESS="$head_ip:$port"

start=(ray start --block --num-gpus="$SLURM_GPUS_ON_NODE" --num-cpus="$SLURM_CPUS_PER_TASK")
on_node "${nodes[0]}" "${start[@]}" --head --node-ip-address="$head_ip" --port="$port" --include-dashboard=false &
for node in "${nodes[@]:1}"; do
  # A node tries for a while to reach a head that is still starting.
  on_node "$node" "${start[@]}" --address="$RAY_ADDRESS" &
done

joined() {
  python3 -c 'import ray; ray.init(log_to_driver=False); print(sum(node["Alive"] for node in ray.nodes()))' || echo 0
}
deadline=$((SECONDS + START_TIMEOUT_S))
while [ "$(joined 2> /dev/null)" -lt "${#nodes[@]}" ]; do
  if ((SECONDS > deadline)); then
    echo "error: not all of ${#nodes[@]} nodes joined Ray at $RAY_ADDRESS in $START_TIMEOUT_S s; see the lines above" >&2
    exit 1
  fi
  sleep 5
done

# Slurm sends TERM to this script before the time is up; the run gets it, and goes on from its newest checkpoint when
# Slurm starts the job again.
c2f-ray train "$@" &
run=$!
trap 'kill -TERM "$run"' TERM
wait "$run" || wait "$run"
