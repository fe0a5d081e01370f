#!/bin/sh
# At commits up to abf24d8: with the memory and the knobs of bench/ablation_phantom.sh that there were then.
# The grid of this record, from the root of the repository: one seed of everything before the next seed of anything. Finished runs are taken over from the record.
# FRESH=1 takes nothing over, for other knobs with an OUT of their own.
export OUT="${OUT:-out/recall-grid}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" ACCELERATOR=cpu TASKS=recall MINI_EPOCHS=8 SEQUENCES=256
export PAIRS=32 KEYS=32 VALUES=8 RECALL_BATCH=8 RECALL_LR="6e-3 5e-4" RECALL_TOKENS="${RECALL_TOKENS:-2000000}"
export RECALL_MODEL="${RECALL_MODEL:---n_layer 1 --n_embd 32 --head_size 16 --ttt_chunk 32}"
export MEMORY_LR="${MEMORY_LR:-2}" MEMORY_ROWS=64 VARIANTS="${VARIANTS:-rwkv7 state memory memory_fast memory_wide ghost ghost_memory}"
[ -n "${FRESH:-}" ] || { mkdir -p "$OUT" && cp -rn records/2026-11-26-phantom-recall/recall "$OUT"; } || exit
for seed in ${SEEDS:-1 2 3}; do
    SEEDS=$seed bench/ablation_phantom.sh || exit
done
