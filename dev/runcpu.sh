#!/usr/bin/env bash
# The CPU profile of run10.sh (also on its own: bash dev/runcpu.sh): a model of 5M parameters on the sources of
# Python's standard library, small enough for two cores. It shows every step; do not expect wit.
if [ -z "${DESCRIPTION:-}" ]; then # started by itself, not through run10.sh
    DESCRIPTION="Train a small model from text to report card on a CPU in about 12 minutes."
    . "$(dirname "$0")/recipe.sh"
    recipe_options "$@"
fi
recipe_setup cpu
report_reset
stage python -m nanochat.dataset --source stdlib
tokenizer_stage 4096 --max_chars=50000000
module scripts.base_train --depth=4 --max_seq_len=256 --device_batch_size=16 --total_batch_size=4096 --streams=16 \
    --num_iterations=900 --eval_every=150 --eval_tokens=131072 --core_metric_every=-1 --sample_every=450 \
    --save_every=50 --run="$WANDB_RUN" ${EXTRA[@]+"${EXTRA[@]}"}
TAG="$(base_tag 4)"
module scripts.base_loss --device_batch_size=16 --split_tokens=262144 --model_tag="$TAG"
module scripts.base_eval --model_tag="$TAG"
stage python -m nanochat.report generate
