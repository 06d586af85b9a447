#!/usr/bin/env bash
# The CPU profile of run10.sh (also on its own: bash dev/runcpu.sh): a model of 5M parameters on the sources of
# Python's standard library, small enough for two cores. It shows every stage; the model itself knows little.
if [ -z "${DESCRIPTION:-}" ]; then # started by itself, not through run10.sh
    DESCRIPTION="Train a small chat model, from text to report, on a CPU in 12 to 15 minutes."
    . "$(dirname "$0")/recipe.sh"
    recipe_options "$@"
fi
export NANOCHAT_BASE_DIR="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat-cpu}" # separate from models of other sizes
recipe_setup cpu
DEPTH=4 BATCH=16 T=256 EVAL=131072 PIECE=1024 TASKS=local DATA="" RATES="" HORIZON=--target_minutes=5.5 MID="" WITH_MC=""
CHATS=--device_batch_size=$BATCH
if [ $MC = 1 ]; then
    export NANOCHAT_BASE_DIR="$NANOCHAT_BASE_DIR/mc" # its text is another
    # A model so small learns to look things up from short documents that tell facts again, in 350 to 600 steps at half
    # the usual rates; then come longer ones, half of the text. Its chats are longer than its context was in pretraining
    EVAL=32768 PIECE=4096 TASKS=memory CHATS="--max_seq_len=512 --device_batch_size=8" MID=--num_iterations=400
    RATES="--matrix_lr=0.01 --embedding_lr=0.1 --unembedding_lr=0.002" WITH_MC="--mc --compare"
    HORIZON=--num_iterations=1200
    [ -z "$(extra_option target_minutes "")" ] || HORIZON=""
    DATA="--recall_primer=11000000 --recall_part=0.5 --recall_chars=6000 --recall_questions=14 --recall_tables=0
        --recall_distractors=0 --recall_times=8 --recall_ask=0 --recall_min_distance=32"
    # Memory is plentiful, and a plain beginning leaves too few steps with gists here (dev/LOG.md)
    MC_OPTIONS=(--block_size=16 --mc_auto_batch=0 --mc_start=0 ${MC_OPTIONS[@]+"${MC_OPTIONS[@]}"})
fi
report_reset
stage python -m nanochat.dataset --source stdlib $DATA
tokenizer_stage 4096 --max_chars=50000000
module scripts.base_train --depth=$DEPTH --max_seq_len=$T --device_batch_size=$BATCH --total_batch_size=4096 \
    --streams=$BATCH --piece_tokens=$PIECE $HORIZON $RATES --warmdown_ratio=0.4 --eval_every=150 \
    --eval_tokens=$EVAL --core_metric_every=-1 --sample_every=450 --save_every=50 --run="$WANDB_RUN" \
    ${MC_OPTIONS[@]+"${MC_OPTIONS[@]}"} ${EXTRA[@]+"${EXTRA[@]}"}
TAG="$(base_tag $DEPTH)" LATER="$(later_options)" DEVICE="$(device_options)"
# Pretraining has as many steps as this machine manages in its minutes; midtraining up to 2/5 of that
STEPS="$(cat "$NANOCHAT_BASE_DIR/base_checkpoints/$TAG"/meta_*.json 2>/dev/null |
    sed -n 's/^ *"total": \([0-9]*\).*/\1/p' | tail -n 1)" || STEPS=""
[ "${STEPS:-1000}" -ge 625 ] || MID=--num_iterations=$((STEPS * 2 / 5 + 1))
module scripts.base_loss --device_batch_size=$BATCH --split_tokens=262144 --model_tag="$TAG" $DEVICE
module scripts.base_eval --model_tag="$TAG" $DEVICE
mc_evaluation "$TAG" --sequences=96 --probe_steps=150 $DEVICE
identity_stage
module scripts.mid_train --tasks=$TASKS --total_batch_size=4096 --eval_every=80 \
    --eval_tokens=16384 --save_every=40 --model_tag="$TAG" --run="$WANDB_RUN" $CHATS $MID \
    ${MC_OPTIONS[@]+"${MC_OPTIONS[@]}"} $LATER
stage python -m scripts.chat_eval -i mid --tasks=$TASKS -m 128 --model_tag="$TAG" $WITH_MC $DEVICE
module scripts.chat_sft --tasks=$TASKS --device_batch_size=32 --eval_every=40 --eval_steps=5 --eval_metrics_every=-1 \
    --save_every=20 --model_tag="$TAG" --run="$WANDB_RUN" $LATER
stage python -m scripts.chat_eval -i sft --tasks=$TASKS -m 128 --model_tag="$TAG" $WITH_MC $DEVICE
if [ "$RL" = 1 ]; then
    module scripts.chat_rl --tasks=local --num_iterations=60 --max_new_tokens=32 --device_batch_size=16 \
        --examples_per_step=8 --eval_every=20 --eval_examples=64 --model_tag="$TAG" --run="$WANDB_RUN" $LATER
    stage python -m scripts.chat_eval -i rl --tasks=local -m 128 --model_tag="$TAG" $DEVICE
fi
stage python -m nanochat.report generate
chat_hint "$TAG"
