#!/bin/sh
# RWKV-7 and a hybrid of as many parameters on associative recall (bench/recall.py), from the root of the repository: ARMS="rwkv7 hybrid" SEEDS="1 2 3"
# Finished runs are kept; results are OUT/ARM-SEED.json.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
PYTHON=${PYTHON:-python} OUT=${OUT:-out/hybrid} task="--pairs ${PAIRS:-64} --keys ${KEYS:-64} --values 8"
ctx_len=$((4 * ${PAIRS:-64})) vocabulary=$((${KEYS:-64} + 9)) samples=$((${TOKENS:-2000000} / (4 * ${PAIRS:-64}) / 64 * 64))
mkdir -p "$OUT" || exit
for seed in ${SEEDS:-1 2 3}; do
    # shellcheck disable=SC2086
    [ -e "$OUT/data$seed.npy" ] || "$PYTHON" bench/recall.py make $task --seed "$seed" --samples $((samples * 11 / 10)) --out "$OUT/data$seed.npy" || exit
    for arm in ${ARMS:-rwkv7 hybrid}; do
        [ ! -e "$OUT/$arm-$seed.json" ] || continue
        case $arm in
        rwkv7) model="--my_testing x070 --dim_ffn 128" ;;
        hybrid) model="--my_testing hybrid --dim_ffn ${HYBRID_FFN:-176}" ;;             # block 1 of 0 and 1 has attention
        hybrid_window) model="--my_testing hybrid --dim_ffn ${HYBRID_FFN:-176} --attention_window 32" ;;
        esac
        # shellcheck disable=SC2086
        "$PYTHON" train.py $model --n_layer 2 --n_embd 32 --head_size 16 --vocab_size $vocabulary --data_type numpy --data_file "$OUT/data$seed.npy" \
            --proj_dir "$OUT/$arm-$seed" --train_stage 3 --random_seed "$seed" --ctx_len $ctx_len --micro_bsz 8 --my_exit_tokens $((samples * ctx_len)) \
            --epoch_samples $((samples / 8)) --epoch_save 1 --lr_init 6e-3 --lr_final 5e-4 --warmup_steps 10 --weight_decay 0.001 --accelerator cpu --precision fp32 \
            --enable_progress_bar False &&
            "$PYTHON" bench/recall.py evaluate "$OUT/$arm-$seed" $task --sequences 256 --out "$OUT/$arm-$seed.json" || exit
    done
done
