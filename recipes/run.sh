#!/usr/bin/env bash
# Trains a recipe on this machine.
#
#   recipes/run.sh [--dry-run] RECIPE [key=value ...]
#
#   RECIPE      a file of this folder, without .yaml; `key=value` goes to verl and wins over the recipe
#   --dry-run   (or DRY_RUN=1) prints the command and what recipe and switch set, and starts nothing
#
#   PYTHON      interpreter that has verl and QeRL (python3)
#   PLATFORM    for the dry run: cuda or cpu (cuda)
set -euo pipefail

dry=${DRY_RUN:-0}
if [ "${1:-}" = --dry-run ]; then dry=1; shift; fi
python=${PYTHON:-python3}
recipe=${1:-}
case $recipe in
    '' | -* | *=*)
        echo "run.sh: no recipe given. Usage: run.sh [--dry-run] RECIPE [key=value ...], for example gsm8k_grpo" >&2
        exit 2
        ;;
esac
shift

command=("$python" -m verl.trainer.main_ppo --config-path pkg://qerl_verl.recipes --config-name "$recipe" "$@")
if [ "$dry" != 0 ]; then
    printf 'command:'
    printf ' %q' "${command[@]}"
    printf '\n\n'
    exec "$python" -m qerl_verl.cli.main explain --platform "${PLATFORM:-cuda}" -- "$recipe" "$@"
fi
exec "${command[@]}"
