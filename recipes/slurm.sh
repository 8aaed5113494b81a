#!/usr/bin/env bash
# Trains a recipe on the nodes of a Slurm job: a Ray head on the first node, a Ray worker on each
# other one.
#
#   SHARED=/shared/me MODEL=Qwen/Qwen2.5-7B-Instruct sbatch --nodes=2 recipes/slurm.sh [key=value ...]
#   SHARED=... MODEL=... recipes/slurm.sh --dry-run [key=value ...]    # on any machine: prints, starts nothing
#
# Needed:
#   SHARED         folder that every node sees: data, cache of quantized models, checkpoints
#   MODEL          folder that every node sees, or a name on the hub where the nodes reach it
# Optional:
#   RECIPE         recipe (gsm8k_grpo_nodes)
#   PYTHON         interpreter that has verl and QeRL, on every node (python3); `ray` is looked for beside it
#   GPUS_PER_NODE  default: what Slurm says
#   SRUN_ARGS      more options for each srun, for example a container's
#   HEAD_IP        address of the head, where the one that Ray finds is not on the network you want
#   RAY_PORT       port of the head (6379), below 10002 (Ray's workers take the next 10,000)
#   WAIT_SECONDS   how long the nodes may take to join (600)
#   REQUEUE        1: put the job back into the queue shortly before its time is over; it goes on from its last checkpoint
#   PLATFORM       for the dry run: cuda or cpu (cuda)
#
#SBATCH --job-name=qerl
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@180
set -euo pipefail

say() { echo "slurm.sh: $*"; }
fail() {
    echo "slurm.sh: $*" >&2
    exit 2
}

dry=${DRY_RUN:-0}
if [ "${1:-}" = --dry-run ]; then dry=1; shift; fi
[ -n "${SHARED:-}" ] || fail "SHARED is not set: a folder that every node sees, for data, cache and checkpoints"
[ -n "${MODEL:-}" ] || fail "MODEL is not set: a folder that every node sees, or a name on the Hugging Face hub"
python=${PYTHON:-python3}
ray=ray
case $python in */*) ray=$(dirname "$python")/ray ;; esac
recipe=${RECIPE:-gsm8k_grpo_nodes}
port=${RAY_PORT:-6379}
wait_seconds=${WAIT_SECONDS:-600}
read -r -a srun_args <<<"${SRUN_ARGS:-}"
gpus=${GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-}}

if [ -n "${SLURM_JOB_NODELIST:-}" ]; then
    mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    [ -n "${nodes[0]:-}" ] || fail "scontrol names no node for SLURM_JOB_NODELIST=$SLURM_JOB_NODELIST"
elif [ "$dry" != 0 ]; then
    nodes=(node1 node2)
    gpus=${gpus:-8}
else
    fail "no nodes: SLURM_JOB_NODELIST is not set. Submit this script with sbatch, or add --dry-run"
fi
case $gpus in
    '' | 0 | *[!0-9]*) fail "no GPUs: neither GPUS_PER_NODE nor SLURM_GPUS_ON_NODE is a number above 0 (ask for --gpus-per-node)" ;;
esac
count=${#nodes[@]}
head=${nodes[0]}
workers=("${nodes[@]:1}")

settings=("++shared=$SHARED" "actor_rollout_ref.model.path=$MODEL" "trainer.nnodes=$count" "trainer.n_gpus_per_node=$gpus" "$@")
train=("$python" -u -m verl.trainer.main_ppo --config-path pkg://qerl_verl.recipes --config-name "$recipe" "${settings[@]}")

steps=()
# Runs a command on some nodes, in the background. --overlap: the steps share the nodes.
step() {
    local names=$1 number=$2
    shift 2
    local command=(srun --overlap --nodes="$number" --ntasks="$number" --ntasks-per-node=1 --nodelist="$names"
        --kill-on-bad-exit=1 ${srun_args[@]+"${srun_args[@]}"} "$@")
    if [ "$dry" != 0 ]; then
        printf ' %q' "${command[@]}"
        printf '\n'
    else
        "${command[@]}" &
        steps+=($!)
    fi
}

# Ends the steps; srun passes the signal on to its tasks.
# shellcheck disable=SC2329  # called by traps
stop() {
    trap '' TERM INT USR1
    local running signal pid
    for signal in TERM KILL; do
        mapfile -t running < <(jobs -pr)
        for pid in "${running[@]}"; do kill -"$signal" "$pid" 2>/dev/null || true; done
        for _ in {1..30}; do
            jobs -pr | grep -q . || return 0
            sleep 1
        done
    done
}

# Waits for the last step. Should a Ray node end before it, there is nothing left to wait for.
finish() {
    local last=${steps[-1]} pid rc=0
    unset 'steps[-1]'
    while kill -0 "$last" 2>/dev/null; do
        for pid in "${steps[@]}"; do
            kill -0 "$pid" 2>/dev/null && continue
            wait "$pid" || rc=$?
            echo "slurm.sh: a Ray node ended (exit code $rc) $1; its output is above" >&2
            exit 1
        done
        sleep 1
    done
    wait "$last" || rc=$?
    return "$rc"
}

# shellcheck disable=SC2329  # called by a trap
on_time_limit() {
    say "the time of the job is nearly over"
    stop
    if [ "${REQUEUE:-0}" = 1 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
    exit 124
}

if [ "$dry" != 0 ]; then
    address=${HEAD_IP:-"address-of-$head"}:$port
else
    trap stop EXIT
    trap 'say "told to stop"; exit 143' TERM
    trap 'exit 130' INT
    trap on_time_limit USR1
    ip=${HEAD_IP:-}
    if [ -z "$ip" ]; then
        ip=$(srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" ${srun_args[@]+"${srun_args[@]}"} \
            "$python" -c 'import ray.util; print(ray.util.get_node_ip_address())' | tail -n 1) || true
        [ -n "$ip" ] || fail "Ray does not find the address of $head: is PYTHON=$python right there? HEAD_IP sets it"
    fi
    address=$ip:$port
fi
export RAY_ADDRESS=$address
# Ray lets everybody who reaches its ports run code. Versions that can ask for a token do so; others
# ignore it.
export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token}
export RAY_AUTH_TOKEN=${RAY_AUTH_TOKEN:-$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')}

start=(--num-gpus="$gpus" ${SLURM_CPUS_ON_NODE:+--num-cpus="$SLURM_CPUS_ON_NODE"} --block)
say "$count nodes with $gpus GPUs: ${nodes[*]}; Ray head at $address"
# RAY_ADDRESS would make `ray start --head` refuse to start
step "$head" 1 env -u RAY_ADDRESS "$ray" start --head --node-ip-address="${address%:*}" --port="$port" "${start[@]}"
if [ "${#workers[@]}" -gt 0 ]; then
    step "$head" 1 "$python" -m qerl_verl.cli.main cluster --nodes 1 --gpus "$gpus" --timeout "$wait_seconds"
    [ "$dry" != 0 ] || finish "before the head was up"
    step "$(IFS=, && echo "${workers[*]}")" "${#workers[@]}" "$ray" start --address="$address" "${start[@]}"
fi
step "$head" 1 "$python" -m qerl_verl.cli.main cluster --nodes "$count" --gpus $((count * gpus)) --timeout "$wait_seconds"
[ "$dry" != 0 ] || finish "before the cluster was up"
step "$head" 1 "${train[@]}"
if [ "$dry" != 0 ]; then
    echo
    elsewhere=()
    [ -d "$SHARED" ] || elsewhere=(--elsewhere)
    exec "$python" -m qerl_verl.cli.main explain --platform "${PLATFORM:-cuda}" ${elsewhere[@]+"${elsewhere[@]}"} \
        -- "$recipe" "${settings[@]}"
fi
rc=0
finish "during training" || rc=$?
say "training ended with exit code $rc"
exit "$rc"
