#!/usr/bin/env bash
# One machine, one GPU or none: text to a trained model and a report card.
#   bash run10.sh                # what this machine has
#   bash run10.sh --gpu cpu      # two CPU cores are enough; 12 to 15 minutes, no network but the registries
#   bash run10.sh --gpu 5090     # 32 GB class
#   bash run10.sh --gpu h100
DESCRIPTION="Train a chat model from text to report card on one GPU, or on a CPU in 12 to 15 minutes."
USAGE_EXTRA="  --gpu PROFILE      auto (default), cpu, 5090 (32 GB class) or h100
"
GPU=auto
. "$(dirname "$0")/dev/recipe.sh"
recipe_option() {
    [ "$1" = --gpu ] || return 1
    GPU="$2"
}
recipe_options "$@"

if [ "$GPU" = auto ]; then
    memory="$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits 2>/dev/null | head -n 1 || true)"
    if [ -z "$memory" ]; then
        GPU=cpu
    elif [ "$memory" -ge 70000 ]; then
        GPU=h100
    else
        GPU=5090
    fi
    echo "profile: $GPU (by --gpu auto)"
fi

case "$GPU" in
cpu)
    . dev/runcpu.sh
    ;;
# $10 of one GPU. Data: depth 12 has 186M parameters; × 20 tokens × 4.8 characters / 250M ≈ 72 shards.
5090) hub_recipe 12 8 80 1000000000 ;;
h100) hub_recipe 12 32 80 1000000000 ;;
*) die "--gpu must be auto, cpu, 5090 or h100, got '$GPU'" ;;
esac
