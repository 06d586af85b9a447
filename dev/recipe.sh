# Shared parts of the recipes (run10.sh, speedrun.sh, run1000.sh, dev/runcpu.sh); sourced, not run.
#
# A recipe sets its defaults as variables, calls `recipe_options "$@"`, then `recipe_setup` and `stage …` lines.

set -euo pipefail
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(nproc 2>/dev/null || sysctl -n hw.ncpu)}"
cd "$(dirname "${BASH_SOURCE[0]}")/.."

DRY_RUN=0
RL=0
WANDB_CHOSEN=""
SHARDS=""
EXTRA=()          # options for base_train, passed through as they came
MC=0
MC_OPTIONS=()     # --mc and what belongs to it, for base_train and mid_train
NPROC="${NPROC:-1}"
# Several machines: how many, which of them this is, where the first one listens (by stage, from this port on)
NNODES="${NNODES:-1}" NODE_RANK="${NODE_RANK:-0}" MASTER_ADDR="${MASTER_ADDR:-}" MASTER_PORT="${MASTER_PORT:-29500}"
USAGE_EXTRA="${USAGE_EXTRA:-}"

usage() {
    cat <<TXT
usage: bash $0 [options]

$DESCRIPTION

options:
${USAGE_EXTRA}  --dry-run          print the commands instead of running them
  --rl               reinforcement learning after SFT
  --mc               MegaContext: a working context of tokens and gists. What belongs to it (--block_size,
                     --gistnet_*, --lensnet_*, --allocator*, --mc_*) goes to pretraining and midtraining
  --wandb NAME       log to W&B under this name (default: \$WANDB_RUN, else no W&B)
  --shards N         shards of web text to train on (a bigger model needs more; see the README)
  --nproc N          processes, one per GPU (default $NPROC), on each machine
  --nnodes N         machines; the same command runs on each, on one shared \$NANOCHAT_BASE_DIR, with
                     --node_rank K (0 to N - 1) and --master_addr HOST of machine 0 (see dev/cluster)
  --master_port P    port of the first stage between machines; each further stage takes the next (default 29500)
  --help             this text
Every other option (--depth=12, --device_batch_size 8, …) goes to scripts.base_train; see
  python -m scripts.base_train --help

Files go to \$NANOCHAT_BASE_DIR (default ~/.cache/nanochat). Run it again to go on after an interruption.
TXT
}

die() {
    echo "error: $*" >&2
    exit 1
}

# Reads the command line. A recipe may define recipe_option NAME VALUE for options of its own: it returns 0
# when it took the option.
recipe_options() {
    local name value given
    while [ $# -gt 0 ]; do
        name="${1%%=*}" value="" given=0
        case "$1" in *=*) value="${1#*=}" given=1 ;; esac
        case "$name" in
        --help | -h) usage; exit 0 ;;
        --dry-run | --dry_run) DRY_RUN=1 ;;
        --rl) RL=1 ;;
        --) ;;
        --mc)
            if [ $given = 0 ]; then
                case "${2:-}" in 0 | 1 | true | false | yes | no | on | off) value="$2"; shift ;; esac
            fi
            case "$value" in
            "" | 1 | true | yes | on) MC=1 ;;
            0 | false | no | off) MC=0 ;;
            *) die "--mc takes 1 or 0, got '$value'" ;;
            esac
            ;;
        --mc[_-]* | --allocator* | --gistnet[_-]* | --lensnet[_-]* | --block[_-]size)
            MC_OPTIONS+=("$1")
            if [ $given = 0 ] && [ $# -gt 1 ] && [[ "$2" != --* ]]; then
                MC_OPTIONS+=("$2")
                shift
            fi
            ;;
        --wandb | --nproc | --gpu | --shards | --nnodes | --node[_-]rank | --master[_-]addr | --master[_-]port)
            if [ $given = 0 ]; then
                [ $# -ge 2 ] || die "$name takes a value"
                value="$2"
                shift
            fi
            case "$name" in
            --wandb) WANDB_CHOSEN="$value" ;;
            --nproc) NPROC="$value" ;;
            --shards) SHARDS="$value" ;;
            --nnodes) NNODES="$value" ;;
            --node*) NODE_RANK="$value" ;;
            --master?addr) MASTER_ADDR="$value" ;;
            --master?port) MASTER_PORT="$value" ;;
            --gpu) recipe_option "$name" "$value" || die "$0 takes no $name; see --help" ;;
            esac
            ;;
        --*) EXTRA+=("$1") ;;
        *)
            # The value of an option given as two words
            [ ${#EXTRA[@]} -gt 0 ] && [[ "${EXTRA[${#EXTRA[@]} - 1]}" != *=* ]] || die "unexpected argument '$1'; see --help"
            EXTRA+=("$1")
            ;;
        esac
        shift
    done
    if [ $MC = 1 ]; then
        MC_OPTIONS=(--mc ${MC_OPTIONS[@]+"${MC_OPTIONS[@]}"})
    elif [ ${#MC_OPTIONS[@]} -gt 0 ]; then
        die "${MC_OPTIONS[0]%%=*} means nothing without --mc: add it, or leave the option out"
    fi
    [ -z "$SHARDS" ] || [[ "$SHARDS" =~ ^[1-9][0-9]*$ ]] || die "--shards takes a number of shards, got '$SHARDS'"
    [[ "$NPROC" =~ ^[1-9][0-9]*$ ]] || die "--nproc takes a number of processes, got '$NPROC'"
    [[ "$NNODES" =~ ^[1-9][0-9]*$ ]] || die "--nnodes takes a number of machines, got '$NNODES'"
    [[ "$NODE_RANK" =~ ^[0-9]+$ ]] && [ "$NODE_RANK" -lt "$NNODES" ] ||
        die "--node_rank takes a number from 0 to $((NNODES - 1)), got '$NODE_RANK'"
    [[ "$MASTER_PORT" =~ ^[1-9][0-9]*$ ]] || die "--master_port takes a port, got '$MASTER_PORT'"
    [ "$NNODES" = 1 ] || [ -n "$MASTER_ADDR" ] || die "--nnodes needs --master_addr, the address of machine 0"
}
recipe_option() { return 1; }

# Prints the command, and runs it unless this is a dry run.
show_and_run() {
    printf '\n\033[1m+ %s\033[0m\n' "$*"
    [ "$DRY_RUN" = 1 ] || "$@"
}

# A command of one process; of several machines, the first one runs it.
stage() {
    [ "$NODE_RANK" != 0 ] || show_and_run "$@"
}

# python -m MODULE, by torchrun when there are several processes.
module() {
    local name="$1"
    shift
    if [ "$NNODES" -gt 1 ]; then
        # Each stage has a port of its own, so that no machine meets one that is still at the stage before; and as
        # the first one has stages to itself (data, tokenizer), the others wait for it as long as the job may last.
        show_and_run torchrun --nnodes="$NNODES" --node_rank="$NODE_RANK" --nproc_per_node="$NPROC" \
            --master_addr="$MASTER_ADDR" --master_port="$MASTER_PORT" --rdzv_conf=timeout=864000 -m "$name" -- "$@"
        MASTER_PORT=$((MASTER_PORT + 1))
    elif [ "$NPROC" -gt 1 ]; then
        stage torchrun --standalone --nproc_per_node="$NPROC" -m "$name" -- "$@"
    else
        stage python -m "$name" "$@"
    fi
}

ensure_rust() {
    command -v cargo >/dev/null && return
    [ -f "$HOME/.cargo/env" ] && . "$HOME/.cargo/env" && command -v cargo >/dev/null && return
    echo "installing the Rust toolchain (for the tokenizer trainer)"
    if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ] && apt-get update -qq && apt-get install -y -qq rustup; then
        rustup default stable
    else
        command -v curl >/dev/null || die "cargo is missing and so is curl: install Rust from https://rustup.rs"
        curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh -s -- -y --profile minimal
        . "$HOME/.cargo/env"
    fi
    command -v cargo >/dev/null || die "cargo could not be installed: see https://rustup.rs"
}

ensure_uv() {
    command -v uv >/dev/null && return
    echo "installing uv"
    local python
    python="$(command -v python3 || command -v python)" || die "Python 3.11 or newer is missing"
    if ! "$python" -m pip install --quiet uv 2>/dev/null && ! "$python" -m pip install --quiet --break-system-packages uv; then
        command -v curl >/dev/null || die "uv is missing and can be had neither by pip nor by curl"
        curl -LsSf https://astral.sh/uv/install.sh | sh
    fi
    export PATH="$HOME/.local/bin:$("$python" -m site --user-base)/bin:$PATH"
    command -v pyenv >/dev/null && pyenv rehash
    command -v uv >/dev/null || die "uv was installed but is not on the PATH: add ~/.local/bin to it"
}

# bubblewrap, in which HumanEval's programs run; without it that one evaluation is left out.
install_sandbox() {
    if [ "$DRY_RUN" = 0 ] && ! command -v bwrap >/dev/null && command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
        apt-get update -qq && apt-get install -y -qq bubblewrap || echo "bubblewrap could not be installed"
    fi
}

chat_hint() {
    local mc=""
    [ "$MC" = 0 ] || mc=" --mc"
    cat <<TXT

Talk to the model:
  source .venv/bin/activate
  export NANOCHAT_BASE_DIR="$NANOCHAT_BASE_DIR"
  python -m scripts.chat_web -g $1$mc      # in the browser
  python -m scripts.chat_cli -g $1$mc      # in the terminal
TXT
}

# activate_environment cpu|gpu [options of uv sync]: install what is missing, enter the virtual environment.
activate_environment() {
    ensure_uv
    ensure_rust
    [ -d .venv ] || uv venv --quiet
    UV_COMPILE_BYTECODE=1 uv sync --quiet --extra "$@" # once: every start of Python is seconds faster
    . .venv/bin/activate
}

# recipe_setup cpu|gpu: the environment, activated; .mc_env when present.
recipe_setup() {
    if [ -f .mc_env ]; then
        echo "using the settings in .mc_env"
        set -a
        . ./.mc_env
        set +a
    fi
    export NANOCHAT_BASE_DIR="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}"
    WANDB_RUN="${WANDB_CHOSEN:-${WANDB_RUN:-dummy}}" # the command line wins over .mc_env
    if [ "$DRY_RUN" = 1 ]; then
        echo "dry run: the commands, none of them run"
        echo "+ uv sync --extra $1"
    else
        mkdir -p "$NANOCHAT_BASE_DIR"
        activate_environment "$1" --no-dev --inexact # without what only tests need; what is there stays
    fi
    [ "$WANDB_RUN" = dummy ] || stage python -m scripts.prepare --tasks=none --run="$WANDB_RUN" # now, not after hours
}

# mc_evaluation TAG [OPTIONS]: what the gists of the base model keep, if it has some.
mc_evaluation() {
    [ $MC = 0 ] || stage python -m scripts.mc_eval --model_tag="$@"
}

# extra_option NAME DEFAULT: the value of an option among those for base_train.
extra_option() {
    local found="$2" name=""
    for word in ${EXTRA[@]+"${EXTRA[@]}"}; do
        case "$word" in
        --*=*) name="${word%%=*}" word="${word#*=}" ;;
        --*) name="$word"; continue ;;
        esac
        [ "${name//-/_}" = "__$1" ] && found="$word"
        name=""
    done
    echo "$found"
}

# base_tag DEFAULT_DEPTH: the folder of the base model.
base_tag() {
    extra_option model_tag "d$(extra_option depth "$1")"
}

# shared_options NAME…: those of these options for base_train that were given, for later stages.
shared_options() {
    local name value
    for name in "$@"; do
        value="$(extra_option "$name" "")"
        [ -z "$value" ] || echo "--$name=$value"
    done
}
later_options() { shared_options resume compile dtype device_type; }  # of stages that train
device_options() { shared_options dtype device_type; }                # of those that evaluate

# A tokenizer that is there is used again.
tokenizer_stage() {
    local vocab_size="$1"
    shift
    if [ "$DRY_RUN" = 0 ] && [ -f "$NANOCHAT_BASE_DIR/tokenizer/bpe.json" ]; then
        echo "using the tokenizer in $NANOCHAT_BASE_DIR/tokenizer"
    else
        stage python -m scripts.tok_train --vocab_size="$vocab_size" "$@"
        stage python -m scripts.tok_eval
    fi
}

# The report of a run is begun once: running a recipe again goes on with it.
report_reset() {
    if [ "$DRY_RUN" = 0 ] && [ -f "$NANOCHAT_BASE_DIR/report/header.md" ]; then
        echo "going on with the report in $NANOCHAT_BASE_DIR/report"
    else
        stage python -m nanochat.report reset
    fi
}

# hub_data FIRST TRAIN_SHARDS: the first shards now, for the tokenizer; the others in the background.
DOWNLOAD_PID=""
hub_data() {
    [ "$NODE_RANK" = 0 ] || return 0
    stage python -m nanochat.dataset -n "$1"
    if [ "$DRY_RUN" = 1 ]; then
        echo "+ python -m nanochat.dataset -n $2   (in the background)"
    else
        python -m nanochat.dataset -n "$2" >"$NANOCHAT_BASE_DIR/download.log" 2>&1 &
        DOWNLOAD_PID=$!
    fi
}

hub_data_wait() {
    [ -n "$DOWNLOAD_PID" ] || return 0
    echo "waiting for the data download (see $NANOCHAT_BASE_DIR/download.log)"
    wait "$DOWNLOAD_PID" || die "the data download failed; the end of its log: $(tail -n 5 "$NANOCHAT_BASE_DIR/download.log")"
}

# Conversations about who the model is: yours, if you put some there, else from templates.
identity_stage() {
    if [ "$DRY_RUN" = 0 ] && [ -f "$NANOCHAT_BASE_DIR/identity_conversations.jsonl" ]; then
        echo "using the conversations in $NANOCHAT_BASE_DIR/identity_conversations.jsonl"
    else
        stage python -m dev.gen_synthetic_data
    fi
}

# hub_recipe DEPTH DEVICE_BATCH_SIZE TRAIN_SHARDS TOKENIZER_CHARS: the full pipeline on web text.
hub_recipe() {
    local depth="$1" batch="$2" shards="${SHARDS:-$3}" chars="$4" tag later device
    # What is not compiled keeps more for the backward pass
    [ "$(extra_option compile auto)" != off ] || batch=$((batch / 2))
    batch="$(extra_option device_batch_size "$batch")"
    later="$(later_options)" device="$(device_options)"
    recipe_setup gpu
    install_sandbox
    report_reset
    hub_data $((chars / 250000000)) "$shards" # a shard has about 250M characters
    tokenizer_stage 65536 --max_chars="$chars"
    identity_stage
    stage python -m scripts.prepare
    hub_data_wait
    module scripts.base_train --depth="$depth" --device_batch_size="$batch" --save_every=1000 --keep_last=2 --run="$WANDB_RUN" \
        ${MC_OPTIONS[@]+"${MC_OPTIONS[@]}"} ${EXTRA[@]+"${EXTRA[@]}"}
    tag="$(base_tag "$depth")"
    module scripts.base_loss --device_batch_size="$batch" --model_tag="$tag" $device
    module scripts.base_eval --model_tag="$tag" $device
    mc_evaluation "$tag" --sequences=1024 $device
    module scripts.mid_train --device_batch_size="$batch" --model_tag="$tag" --save_every=200 --keep_last=2 --run="$WANDB_RUN" \
        ${MC_OPTIONS[@]+"${MC_OPTIONS[@]}"} $later
    module scripts.chat_eval -i mid --model_tag="$tag" $device
    module scripts.chat_sft --model_tag="$tag" --save_every=200 --keep_last=2 --run="$WANDB_RUN" $later
    module scripts.chat_eval -i sft --model_tag="$tag" $device
    if [ "$RL" = 1 ]; then
        module scripts.chat_rl --model_tag="$tag" --keep_last=2 --run="$WANDB_RUN" $later
        module scripts.chat_eval -i rl -a GSM8K --model_tag="$tag" $device
    fi
    stage python -m nanochat.report generate
    chat_hint "$tag"
}
