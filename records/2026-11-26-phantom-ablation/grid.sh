#!/bin/sh
# At commits up to abf24d8: with the memory and the knobs of bench/ablation_phantom.sh that there were then.
# The grid of this record, from the root of the repository: one seed of everything before the next seed of anything. Finished runs are taken over from the record.
# FRESH=1 takes nothing over, for other knobs with an OUT of their own.
# TASKS="recall corpus" at commits before bench/recall.py had its present mixture (fcdcd12 and older); later ones can go on with the corpus alone.
export OUT="${OUT:-out/grid}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" ACCELERATOR=cpu SEQUENCES=256
export PAIRS=32 KEYS=32 VALUES=8 RECALL_BATCH=8 RECALL_LR="5e-3 3e-4" RECALL_TOKENS=1500000 RECALL_MODEL="--n_layer 2 --n_embd 64 --head_size 16 --ttt_chunk 16"
export VARIANTS="${VARIANTS:-rwkv7 ghost state memory ghost_state ghost_memory}" CORPUS_TEXT=data/demo-6MB.jsonl CORPUS_MODEL="${CORPUS_MODEL:---n_layer 2 --n_embd 96 --head_size 32 --ttt_chunk 64}"
export CORPUS_BATCH=4 CORPUS_LR="3e-3 3e-4" CORPUS_TOKENS=1000000 CORPUS_VOCAB=1024
[ -n "${FRESH:-}" ] || { mkdir -p "$OUT" && cp -rn records/2026-11-26-phantom-ablation/recall records/2026-11-26-phantom-ablation/corpus "$OUT"; } || exit
[ -e "$CORPUS_TEXT" ] || PYTHONPATH=RWKV-v7 "${PYTHON:-.venv/bin/python}" -m rwkvlm demo_corpus --out "$CORPUS_TEXT" --max_bytes 6000000 || exit
for seed in ${SEEDS:-1 2 3}; do
    for task in ${TASKS:-corpus}; do
        TASKS=$task SEEDS=$seed bench/ablation_phantom.sh || exit
    done
done
