#!/usr/bin/env bash
# Trains a recipe on a Ray cluster that is already running, with `ray job submit`; follows the
# output to the end.
#
#   RAY_ADDRESS=http://head:8265 NNODES=2 SHARED=/shared/me MODEL=Qwen/Qwen2.5-7B-Instruct \
#       recipes/ray_job.sh [--dry-run] [key=value ...]
#
# Needed:
#   RAY_ADDRESS    the cluster's dashboard
#   NNODES         nodes to train on
#   SHARED         folder that every node sees: data, cache of quantized models, checkpoints
#   MODEL          folder that every node sees, or a name on the hub where the nodes reach it
# Optional:
#   RECIPE         recipe (gsm8k_grpo_nodes)
#   GPUS_PER_NODE  (8)
#   JOB_PYTHON     interpreter on the cluster, which has verl and QeRL on every node (python3)
#   RAY_JOB_ARGS   more options for `ray job submit`, for example --no-wait or --submission-id=NAME
#   RAY_AUTH_MODE, RAY_AUTH_TOKEN  (token, and the token) for a cluster that asks for one: Ray 2.60 turns that on where
#                  ~/.ray/auth_token exists when the head starts; RAY_AUTH_TOKEN_PATH names another file
#   PYTHON         interpreter here that has QeRL, for the dry run (python3)
#   PLATFORM       for the dry run: cuda or cpu (cuda)
set -euo pipefail

fail() {
    echo "ray_job.sh: $*" >&2
    exit 2
}

dry=${DRY_RUN:-0}
if [ "${1:-}" = --dry-run ]; then dry=1; shift; fi
[ -n "${RAY_ADDRESS:-}" ] || fail "RAY_ADDRESS is not set: the cluster's dashboard, for example http://head:8265"
[ -n "${NNODES:-}" ] || fail "NNODES is not set: the number of nodes to train on"
[ -n "${SHARED:-}" ] || fail "SHARED is not set: a folder that every node sees, for data, cache and checkpoints"
[ -n "${MODEL:-}" ] || fail "MODEL is not set: a folder that every node sees, or a name on the Hugging Face hub"
recipe=${RECIPE:-gsm8k_grpo_nodes}
read -r -a job_args <<<"${RAY_JOB_ARGS:-}"

settings=("++shared=$SHARED" "actor_rollout_ref.model.path=$MODEL" "trainer.nnodes=$NNODES"
    "trainer.n_gpus_per_node=${GPUS_PER_NODE:-8}" "$@")
command=(ray job submit --address="$RAY_ADDRESS" ${job_args[@]+"${job_args[@]}"} -- "${JOB_PYTHON:-python3}"
    -m verl.trainer.main_ppo --config-path pkg://qerl_verl.recipes --config-name "$recipe" "${settings[@]}")
if [ "$dry" != 0 ]; then
    printf 'command:'
    printf ' %q' "${command[@]}"
    printf '\n\n'
    elsewhere=()
    [ -d "$SHARED" ] || elsewhere=(--elsewhere)
    host=${RAY_ADDRESS#*://}
    host=${host%%/*}
    # in the job RAY_ADDRESS is the head's own address, not the dashboard's
    RAY_ADDRESS=${host%:*}:6379 exec "${PYTHON:-python3}" -m qerl_verl.cli.main explain --platform "${PLATFORM:-cuda}" ${elsewhere[@]+"${elsewhere[@]}"} \
        -- "$recipe" "${settings[@]}"
fi
exec "${command[@]}"
