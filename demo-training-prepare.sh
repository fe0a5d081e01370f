#!/bin/sh
# Prepares a training: sets up Python, gets the data, writes the initial model to the output folder. What is there already is kept.
# demo-training-run.sh does all this first, so this script alone is needed only to prepare without training.
#
# Knobs: change them here, or set them in the environment: N_LAYER=4 ./demo-training-prepare.sh
# (then set them likewise for demo-training-run.sh). Relative paths are meant from this folder.
#
[ $# -eq 0 ] || {
    echo "error: $0 takes no arguments ($*); knobs stand before it, as in N_LAYER=4 $0, and at the top of the scripts" >&2
    exit 2
}
cd "$(dirname "$(readlink -f "$0")")" || exit 1
. RWKV-v7/env.sh
#
# DATA=demo       30 MB of text found on this machine: Python's standard library and packages (default without a GPU)
# DATA=minipile   1498226207 tokens, around 3GB, downloaded to data/ (default with a GPU, and where it is there already)
# DATA=pile       the two official files, see demo-training-prepare-v7-pile.sh
# DATA=PREFIX     your own PREFIX.bin and PREFIX.idx, made by make_data.py
#
[ -e data/minipile.bin ] && : "${DATA:=minipile}"
#
#    name        CPU   GPU
knob DATA        demo  minipile
knob MODEL_TYPE  x070  x070 # x070 => rwkv-7; phantom => rwkv-7 TTT Phantom; hybrid => rwkv-7 with attention; x080 => rwkv-8 (ROSA); rosa => ROSA alone; x040 => rwkv-4
knob N_LAYER     6     12
knob N_EMBD      256   768
case $MODEL_TYPE in x040 | rosa) : "${HEAD_SIZE=0}" ;; esac # they have none
knob HEAD_SIZE   64    64
knob CTX_LEN     256   512
knob RANDOM_SEED -1    -1 # of the initial weights; -1 => a new one each time
knob TRAIN_FLAGS ""    "" # further flags of train.py, for the initial model and the training, such as "--ttt_kind memory --core_ratio 1"
: "${PROJ_DIR:=out/L$N_LAYER-D$N_EMBD-$MODEL_TYPE}" # set output folder
#
VOCAB=65536 ALL_TOKENS=0 # 0 => as many as the files hold
case $DATA in
demo) DATA_FILE=data/demo ;;
minipile) DATA_FILE=data/minipile ALL_TOKENS=1498226207 ;;
pile) DATA_FILE=${PILE_PREFIX:-data/pile_20B_tokenizer_text_document} ALL_TOKENS=332115325534 VOCAB=50304 ;;
*) DATA_FILE=$DATA ;;
esac
knob VOCAB_SIZE  $VOCAB $VOCAB

check_size() { # FILE BYTES
    [ -r "$1" ] || die "$1 is not there; put the official file there, or set PILE_PREFIX="
    [ "$(wc -c <"$1" | tr -d ' ')" = "$2" ] || die "$1 has $(wc -c <"$1" | tr -d ' ') bytes, not $2: it is incomplete or another file; get it again"
}

demo_corpus() { # unless it is there: another node may just have made it
    [ -e data/demo.bin ] && [ -e data/demo.idx ] || {
        forward_signals "$PYTHON" -m rwkvlm demo_corpus --out data/demo.jsonl &&
            forward_signals "$PYTHON" make_data.py data/demo.jsonl 1 "$CTX_LEN" --out data/demo --val_split 0.03
    }
}

alone() { # a command that makes files in data/, with one start at a time; where nothing can be written, it says so itself if it has to
    mkdir -p data 2>/dev/null
    (: >>data/.lock) 2>/dev/null && take_lock data/.lock "making $DATA_FILE"
    "$@" || exit
    drop_lock
}

case $DATA in
demo) alone demo_corpus ;;
minipile) alone forward_signals "$PYTHON" -m rwkvlm download --out data/minipile ;;
pile)
    check_size "$DATA_FILE.bin" 664230651068
    check_size "$DATA_FILE.idx" 4212099722
    ;;
esac

begun() { # also with weights put there by hand, or by a run whose rwkv-init.pth has been deleted since
    for file in "$PROJ_DIR"/rwkv-*.pth "$PROJ_DIR/state/latest"; do [ ! -e "$file" ] || return 0; done
    return 1
}

loaded=
if ! begun; then
    set -f # TRAIN_FLAGS are words, not names of files
    forward_signals "$PYTHON" train.py --wandb "" --proj_dir "$PROJ_DIR" \
        --data_file "$DATA_FILE" --data_type "binidx" --vocab_size "$VOCAB_SIZE" --my_testing "$MODEL_TYPE" \
        --ctx_len "$CTX_LEN" --train_stage 1 --head_size "$HEAD_SIZE" --random_seed "$RANDOM_SEED" \
        --n_layer "$N_LAYER" --n_embd "$N_EMBD" --accelerator cpu --devices 1 $TRAIN_FLAGS || exit
    set +f
    ! begun || loaded="--load_model 0" # one that TRAIN_FLAGS name is in rwkv-init.pth now
fi
