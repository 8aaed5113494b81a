#!/usr/bin/env bash
# Trains a recipe on Kubernetes with KubeRay: fills in kuberay.yaml and creates the RayJob.
#
#   IMAGE=registry/image:tag CLAIM=my-claim MODEL=Qwen/Qwen2.5-7B-Instruct recipes/kuberay.sh [--dry-run] [key=value ...]
#
# Needed (kuberay.yaml says more):
#   IMAGE          container image of all pods
#   CLAIM          ReadWriteMany volume claim, mounted at /shared
#   MODEL          folder under /shared, or a name on the hub
# Optional:
#   RECIPE         recipe (gsm8k_grpo_nodes)
#   NNODES         worker pods (2)
#   GPUS_PER_NODE  (8)
#   KUBECTL_ARGS   more options for kubectl, for example --namespace=NAME
#   PYTHON         interpreter here that has QeRL, for the dry run (python3)
#   PLATFORM       for the dry run: cuda or cpu (cuda)
set -euo pipefail

fail() {
    echo "kuberay.sh: $*" >&2
    exit 2
}

dry=${DRY_RUN:-0}
if [ "${1:-}" = --dry-run ]; then dry=1; shift; fi
[ -n "${IMAGE:-}" ] || fail "IMAGE is not set: the container image, see kuberay.yaml for what it has to contain"
[ -n "${CLAIM:-}" ] || fail "CLAIM is not set: the name of a ReadWriteMany PersistentVolumeClaim"
[ -n "${MODEL:-}" ] || fail "MODEL is not set: a folder under /shared, or a name on the Hugging Face hub"
RECIPE=${RECIPE:-gsm8k_grpo_nodes} NNODES=${NNODES:-2} GPUS_PER_NODE=${GPUS_PER_NODE:-8} OVERRIDES=
# shellcheck disable=SC2034  # the loop below reads it by its name
if [ $# -gt 0 ]; then printf -v OVERRIDES '%q ' "$@"; fi
read -r -a kubectl_args <<<"${KUBECTL_ARGS:-}"

manifest=$(<"$(dirname "${BASH_SOURCE[0]}")/kuberay.yaml")
for name in RECIPE NNODES GPUS_PER_NODE IMAGE CLAIM MODEL OVERRIDES; do
    manifest=${manifest//"\${$name}"/"${!name}"}
done

command=(kubectl create ${kubectl_args[@]+"${kubectl_args[@]}"} -f -)
if [ "$dry" != 0 ]; then
    printf 'command:'
    printf ' %q' "${command[@]}"
    printf '\n\n%s\n\n' "$manifest"
    exec "${PYTHON:-python3}" -m qerl_verl.cli.main explain --platform "${PLATFORM:-cuda}" --elsewhere \
        -- "$RECIPE" ++shared=/shared "actor_rollout_ref.model.path=$MODEL" "trainer.nnodes=$NNODES" "trainer.n_gpus_per_node=$GPUS_PER_NODE" "$@"
fi
"${command[@]}" <<<"$manifest"
