#!/bin/bash
# The runs of README.md, in $OUT; each argument is one of them: data init fp32 fp32_other_instructions bf16 two_ranks going_on ours
#   SRC: RWKV-v7/train_temp/src of a clone of RWKV-LM; LIGHTNING: a folder with pytorch-lightning 1.9.5 and setuptools below 80 (pip install --no-deps --target)
set -e
ROOT=$(cd "$(dirname "$0")/../.." && pwd)
OUT=${OUT:-/tmp/official-trainer} PYTHON=${PYTHON:-$ROOT/.venv/bin/python} PRIME=6269
mkdir -p "$OUT"
export OMP_NUM_THREADS=1

flags() { # DEVICES MICRO_BSZ PROJ_DIR STAGE
    echo --proj_dir "$3" --my_testing x070 --ctx_len 128 --train_stage "$4" --epoch_count 999999 --epoch_begin 0 --data_file "$OUT/data" \
        --my_exit_tokens 20480 --magic_prime $PRIME --num_nodes 1 --micro_bsz "$2" --n_layer 2 --n_embd 128 --lr_init 6e-4 --lr_final 6e-5 --warmup_steps 10 \
        --beta1 0.9 --beta2 0.99 --adam_eps 1e-18 --data_type binidx --vocab_size 256 --weight_decay 0.001 --epoch_save 1 --head_size 64 --head_chunk 0 \
        --accelerator cpu --devices "$1"
}
begin() { rm -rf "${OUT:?}/$1" "$OUT"/program-"$1"*; mkdir -p "$OUT/$1"; cp "$OUT/init/rwkv-init.pth" "$OUT/$1/"; }
official() { # NAME DEVICES MICRO_BSZ STAGE more flags
    local name=$1 devices=$2 micro=$3 stage=$4 launcher=
    shift 4
    [ "$devices" = 1 ] || launcher="-m torch.distributed.run --nproc_per_node $devices"
    PYTHONPATH=$LIGHTNING "$PYTHON" -W ignore $launcher "$ROOT/tests/oracles/official_trainer.py" "$SRC" "$OUT/program-$name" --epoch_samples 60 -- \
        $(flags "$devices" "$micro" "$OUT/$name" "$stage") --wandb x "$@" >"$OUT/$name.log" 2>&1 || echo "$name ended with exit code $?"
}
ours() { # NAME DEVICES MICRO_BSZ more flags
    local name=$1 devices=$2 micro=$3
    shift 3
    "$PYTHON" "$ROOT/train.py" $(flags "$devices" "$micro" "$OUT/$name" 3) --epoch_samples 60 "$@" >"$OUT/$name.log" 2>&1
}

for run in "$@"; do
    case $run in
    data) # 803,513 bytes of Python's standard library, as tokens
        PYTHONPATH=$ROOT/RWKV-v7 "$PYTHON" - "$OUT/data" <<'END'
import pathlib, sys, sysconfig
import numpy as np
from rwkvlm.data.binidx import BinIdxWriter

n = 0
with BinIdxWriter(sys.argv[1], np.uint16) as out:
    for path in sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py")):
        if n < 800_000:
            document = np.append(np.frombuffer(path.read_bytes()[:20_000], np.uint8), 0).astype(np.uint16)
            out.add(document)
            n += len(document)
END
        ;;
    init) official init 1 2 1 --precision bf16 --strategy deepspeed_stage_2 ;;
    fp32) begin official_fp32; official official_fp32 1 2 3 --precision fp32 --strategy ddp ;;
    fp32_other_instructions)
        begin official_fp32_other
        ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2 official official_fp32_other 1 2 3 --precision fp32 --strategy ddp
        ;;
    bf16) begin official_bf16; official official_bf16 1 2 3 --precision bf16 --strategy deepspeed_stage_2 --grad_cp 1 ;;
    two_ranks) begin official_two; official official_two 2 1 3 --precision fp32 --strategy ddp ;;
    ours)
        begin ours_fp32; ours ours_fp32 1 2 --precision fp32 --strategy ddp --grad_cp 1
        begin ours_bf16; ours ours_bf16 1 2 --precision bf16 --strategy deepspeed_stage_2 --grad_cp 1
        begin ours_bf16_ddp; ours ours_bf16_ddp 1 2 --precision bf16 --strategy ddp --grad_cp 1
        begin ours_two; ours ours_two 2 1 --precision fp32 --strategy ddp
        ;;
    going_on) # each goes on with a file of the other
        begin official_goes_on; cp "$OUT/ours_fp32/rwkv-0.pth" "$OUT/official_goes_on/"; official official_goes_on 1 2 3 --precision fp32 --strategy ddp
        begin ours_goes_on; cp "$OUT/ours_fp32/rwkv-0.pth" "$OUT/ours_goes_on/"; ours ours_goes_on 1 2 --precision fp32 --strategy ddp
        begin ours_goes_on_theirs; cp "$OUT/official_fp32/rwkv-0.pth" "$OUT/ours_goes_on_theirs/"; ours ours_goes_on_theirs 1 2 --precision fp32 --strategy ddp
        ;;
    esac
done
