#!/bin/sh
# The Phantom ablation: RWKV-7; Ghost layers; TTT on the state; TTT with a memory; both. Equal parameters (within 2 %), tokens and data; three seeds each.
# memory has the default number of features of each key, twice the head's channels, memory_wide MEMORY_FEATURES.
#
#   corpus   the demo corpus in 2048 byte pairs trained on its own text: of the World tokenizer's 65536 rows a model of a million parameters would spend
#            nearly all of its arithmetic in the head, which no variant touches. Held-out loss
#   recall   multi-query associative recall (bench/recall.py), from few pairs to more than the state holds. Answers that are right, held out, by pairs
#
# It goes on where it was stopped: a run whose $OUT/TASK/VARIANT-SEED.json exists is finished. These files and plan.json are all that has to be copied into
# another OUT for it to go on there. The result: $OUT/{corpus,recall}/report.md, report.json and .svg
# Knobs, in the environment: TASKS=recall SEEDS=1 VARIANTS="rwkv7 memory" bench/ablation_phantom.sh
# One seed changes the initial weights, and for recall the training data too; the order of the corpus is the same for all.
#
CDPATH= cd "$(dirname "$0")/.." || exit 1
: "${ACCELERATOR:=cpu}"
. RWKV-v7/env.sh
#
knob OUT           out/ablation out/ablation
knob TASKS         "corpus recall" "corpus recall"
knob SEEDS         "1 2 3" "1 2 3"
knob VARIANTS      "rwkv7 ghost state memory memory_wide ghost_state ghost_memory" "rwkv7 ghost state memory memory_wide ghost_state ghost_memory"
knob CORE_RATIO    0.5 0.5 # of the Ghost variants
knob MEMORY_FEATURES 64 64
knob MINI_EPOCHS   10 10 # points of each curve
knob PRECISION     fp32 fp32
knob CORPUS_TEXT   data/demo.jsonl data/demo.jsonl
knob CORPUS_MODEL  "--n_layer 4 --n_embd 128 --head_size 32 --ttt_chunk 64" "--n_layer 4 --n_embd 128 --head_size 32 --ttt_chunk 64"
knob CORPUS_CTX    512 512
knob CORPUS_BATCH  8 8
knob CORPUS_LR     "2e-3 2e-4" "2e-3 2e-4" # first and last
knob CORPUS_TOKENS 20000000 20000000
knob CORPUS_VOCAB  2048 2048
knob RECALL_MODEL  "--n_layer 1 --n_embd 32 --head_size 16 --ttt_chunk 32" "--n_layer 1 --n_embd 32 --head_size 16 --ttt_chunk 32"
knob RECALL_BATCH  8 8
knob RECALL_LR     "6e-3 5e-4" "6e-3 5e-4"
knob RECALL_TOKENS 2000000 2000000
knob PAIRS         32 32
knob KEYS          32 32 # with more of them a small model begins to recall much later
knob VALUES        8 8
knob SEQUENCES     256 256 # of each number of pairs that the accuracy is measured on
#
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-10000}"       # as commands of rwkvlm set it, and for bench/*.py
export MALLOC_MMAP_MAX_="${MALLOC_MMAP_MAX_:-0}"       # as in demo-training-run.sh
export MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-100000000000}"

run_all() { # TASK CTX_LEN TOKENS BATCH VOCABULARY MODEL RATES DATA: plans, trains what is not finished, reports
    task=$1 ctx_len=$2 tokens=$3 batch=$4 vocabulary=$5 model=$6
    epoch_samples=$((tokens / ctx_len / MINI_EPOCHS / batch * batch))
    [ $epoch_samples -gt 0 ] || die "$tokens tokens are less than $MINI_EPOCHS mini-epochs of $batch samples of $ctx_len tokens; use more tokens or a smaller MINI_EPOCHS"
    tokens=$((epoch_samples * MINI_EPOCHS * ctx_len))
    # shellcheck disable=SC2086
    "$PYTHON" bench/ablation_phantom.py plan "$OUT/$task" $model --ctx_len $ctx_len --vocab_size "$vocabulary" --core_ratio "$CORE_RATIO" \
        --features "$MEMORY_FEATURES" \
        --epoch_samples $epoch_samples --tokens $tokens --variants $VARIANTS --seeds $SEEDS \
        --conditions "batch $batch, lr $7, $PRECISION, $8" || exit
    for seed in $SEEDS; do # one seed of every variant before the next seed of any
        for variant in $VARIANTS; do
            dir=$OUT/$task/$variant-$seed
            [ ! -e "$dir.json" ] || continue
            "data_of_$task" "$seed" || exit
            if [ ! -e "$dir/rwkv-final.pth" ]; then
                echo "--- $task: $variant, seed $seed"
                # shellcheck disable=SC2046,SC2086
                forward_signals "$PYTHON" train.py $(cat "$OUT/$task/$variant.flags") $data --proj_dir "$dir" --train_stage 3 --random_seed "$seed" \
                    --ctx_len $ctx_len --micro_bsz "$batch" --my_exit_tokens $tokens --epoch_samples $epoch_samples --epoch_save 1 --val_batches 32 \
                    --lr_init "${7% *}" --lr_final "${7#* }" --warmup_steps 10 --beta2 0.99 --adam_eps 1e-18 --weight_decay 0.001 \
                    --accelerator "$ACCELERATOR" --devices 1 --strategy auto --precision "$PRECISION" || exit
            fi
            "after_$task" "$dir" && "$PYTHON" bench/ablation_phantom.py result "$OUT/$task" "$variant-$seed" || exit
        done
    done
    "$PYTHON" bench/ablation_phantom.py report "$OUT/$task" || exit
}

data_of_corpus() {
    text=$OUT/corpus/demo
    if [ ! -e "$text.val.idx" ]; then
        [ -e "$CORPUS_TEXT" ] || "$PYTHON" -m rwkvlm demo_corpus --out "$CORPUS_TEXT" || return
        "$PYTHON" bench/ablation_phantom.py tokenizer "$CORPUS_TEXT" --vocab_size "$CORPUS_VOCAB" --out "$text.json" &&
            "$PYTHON" make_data.py "$CORPUS_TEXT" 1 "$CORPUS_CTX" --out "$text" --tokenizer "$text.json" --val_split 0.03 || return
    fi
    data="--data_file $text"
}
after_corpus() { :; }

data_of_recall() {
    task_of_recall="--pairs $PAIRS --keys $KEYS --values $VALUES"
    data="--data_type numpy --data_file $OUT/recall/seed$1.npy --val_file $OUT/recall/held_out.npy"
    # more sequences than a run reads: magic_prime, a prime below their number, decides how many of them one pass has
    # shellcheck disable=SC2086
    [ -e "$OUT/recall/seed$1.npy" ] || "$PYTHON" bench/recall.py make $task_of_recall --seed "$1" --samples $((tokens / ctx_len + 200)) --out "$OUT/recall/seed$1.npy" || return
    # shellcheck disable=SC2086
    [ -e "$OUT/recall/held_out.npy" ] || "$PYTHON" bench/recall.py make $task_of_recall --seed 1000000 --samples $((32 * batch + 1)) --out "$OUT/recall/held_out.npy"
}
after_recall() {
    # shellcheck disable=SC2086
    [ -e "$1/recall.json" ] || "$PYTHON" bench/recall.py evaluate "$1" $task_of_recall --sequences "$SEQUENCES" --out "$1/recall.json"
}

for task in $TASKS; do
    case $task in
    corpus) run_all corpus "$CORPUS_CTX" "$CORPUS_TOKENS" "$CORPUS_BATCH" "$CORPUS_VOCAB" "$CORPUS_MODEL" "$CORPUS_LR" "$CORPUS_TEXT" ;;
    recall) run_all recall $((4 * PAIRS)) "$RECALL_TOKENS" "$RECALL_BATCH" $((1 + KEYS + VALUES)) "$RECALL_MODEL" "$RECALL_LR" "4 to $PAIRS pairs of $KEYS keys and $VALUES values" ;;
    *) die "TASKS=$task is not known; use corpus, recall or both" ;;
    esac
done
