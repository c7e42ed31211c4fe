#!/bin/bash
# raylora in a SLURM job: a Ray cluster over the nodes of the allocation, and one run on it.
#
# In the root of the repository, with raylora installed in .venv on a file system that all nodes see:
#
#     sbatch cluster/slurm.sh --chunk chunk_001 --model /shared/models/Meta-Llama-3-8B-Instruct --data-root /shared/data --mmlu /shared/mmlu/test_all_subjects.json --output /shared/results
#     squeue --me
#     tail -f raylora-JOBID.out
#     ssh -L 8265:localhost:8265 FIRST-NODE
#     srun --jobid JOBID --overlap --pty bash
#
# All that follows the script's name goes to `python -m raylora.batch`. Submit the same again after the time limit: it
# resumes where it stopped. The dashboard listens on localhost of the first node: forward it as above, open
# http://localhost:8265, and give it what `.venv/bin/ray get-auth-token` prints.
#
#SBATCH --job-name=raylora
#SBATCH --output=raylora-%j.out
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --mem=256G
#SBATCH --time=12:00:00
#SBATCH --signal=B:INT@120

set -euo pipefail

export PATH="$PWD/.venv/bin:$PATH"
# The token lies in ~/.ray/auth_token, which all nodes see; it is made once.
export RAY_AUTH_MODE=token
ray get-auth-token --generate > /dev/null
export RAY_TMPDIR="${TMPDIR:-/tmp}"
export RAY_USAGE_STATS_ENABLED=0

mapfile -t nodes < <(scontrol show hostnames "${SLURM_JOB_NODELIST:?run it with sbatch}")
head=${nodes[0]}
head_ip=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | awk '{print $1}')
port=$((6379 + ${SLURM_JOB_ID:?run it with sbatch} % 10000))
gpus=${SLURM_GPUS_ON_NODE:-0}

started=()
trap 'kill "${started[@]}" 2> /dev/null || true; wait' EXIT

srun --nodes=1 --ntasks=1 --nodelist="$head" --overlap \
    ray start --head --node-ip-address="$head_ip" --port="$port" --num-gpus="$gpus" \
    --min-worker-port=20000 --max-worker-port=29999 --dashboard-host=127.0.0.1 --block &
started+=($!)
for _ in $(seq 60); do
    ray status --address="$head_ip:$port" > /dev/null 2>&1 && break
    sleep 2
done
for node in "${nodes[@]:1}"; do
    srun --nodes=1 --ntasks=1 --nodelist="$node" --overlap \
        ray start --address="$head_ip:$port" --num-gpus="$gpus" \
        --min-worker-port=20000 --max-worker-port=29999 --block &
    started+=($!)
done

# In the background, so that the signal before the time limit reaches it at once: it finishes what is cheap and stops.
# With job control, as bash has background processes ignore SIGINT without it.
set -m
python -m raylora.batch --address "$head_ip:$port" "$@" &
run=$!
trap 'kill -INT "$run"' INT
code=0
wait "$run" || code=$?
while kill -0 "$run" 2> /dev/null; do # the wait itself was interrupted by the signal
    wait "$run" || code=$?
done
exit "$code"
