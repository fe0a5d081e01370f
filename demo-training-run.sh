#!/bin/sh
# Trains: on a GPU the official MiniPile recipe, without one a small model that learns to write Python in minutes. Prints a sample at the end.
#
# Stop it at any time (Ctrl-C, SIGTERM) and start it again: it goes on where it stopped, and does nothing when it is finished.
# A new run beside an old one: PROJ_DIR=out/another ./demo-training-run.sh. Nothing is ever deleted here.
#
# Knobs: change them here, or set them in the environment: M_BSZ=8 N_LAYER=4 ./demo-training-run.sh
# DATA, MODEL_TYPE, N_LAYER, N_EMBD, CTX_LEN, TRAIN_FLAGS and PROJ_DIR stand in demo-training-prepare.sh, which is run first and makes whatever is missing.
#
. "$(dirname "$(readlink -f "$0")")/demo-training-prepare.sh"
#
# Note bsz & lr affects model & training performance
# Small data => use smaller bsz & slightly smaller LR
# Large data => use larger bsz & slightly larger LR
# Larger model => use smaller LR
# Finetuning => use very small LR, such as 1e-5
#
samples=40320
[ "$DATA" != demo ] || samples=500 # it has no 40320 samples
#    name          CPU     GPU
knob N_NODE        1       1 # number of nodes
knob GPU_PER_NODE  1       1 # number of GPUs (without GPUs: processes) per node
knob M_BSZ         8       16 # samples per step and device; 16 takes ~9G VRAM (GRAD_CP=1: ~5G, estimated) => reduce this to save VRAM, increase this for faster speed
knob LR_INIT       2e-3    6e-4
knob LR_FINAL      2e-4    6e-5
knob W_DECAY       0.001   0.001
knob BETA_2        0.99    0.99
knob ADAM_EPS      1e-18   1e-18
knob GRAD_CP       0       -1 # 1 => slower, save VRAM; 0 => faster, more VRAM; -1 => 0 where the VRAM is enough
knob COMPILE       0       0 # 1 => the blocks through torch.compile, which takes a while at the start
knob CUDA_GRAPHS   0       -1 # 1 => each block as a CUDA graph: a small model waits less for Python, takes more VRAM; a GPU only; -1 => where it helps, on one GPU, once compared; 0 => not
knob HEAD_CHUNK    0       0 # tokens per chunk of LM head and loss; 0 => chosen by itself; smaller => slower, less VRAM
knob KERNEL        ""      "@rwkv3" # "" and "@rwkv3" => automatic; cuda, cpu, torch => this one or an error
knob PRECISION     auto    bf16 # auto => bf16 or fp32, whichever is faster here
[ "$N_NODE" = 1 ] || [ "$ACCELERATOR $PRECISION" != "cpu auto" ] || PRECISION=bf16 # auto would be measured by each node for itself
case "$N_NODE $GPU_PER_NODE $PRECISION" in
"1 1 fp16") zero=deepspeed_stage_2 ;; # which scales its loss
"1 1 "*) zero=auto ;; # one GPU has nothing to share out, and ZeRO-2 doubles what a step costs the host: records/2026-11-28-host-time
*) zero=deepspeed_stage_2 ;;
esac
knob STRATEGY      auto    $zero # ddp => on several GPUs a small model waits less for Python, each GPU keeps the whole optimizer
knob EPOCH_SAMPLES 500     $samples # samples in a "miniepoch": a line in train_log.txt, a validation, a full training state
knob EPOCH_SAVE    1       10 # save rwkv-*.pth every so many "miniepochs" => decrease if your GPU is weak
knob SAVE_MINUTES  1       10 # also save the full training state after so many minutes
knob EXIT_TOKENS   1000000 $ALL_TOKENS # tokens to train => increase it to train longer; 0 => once through the data
knob WANDB         ""      "" # Weights & Biases project
knob PROMPT        "def "  "The " # beginning of the sample text at the end; "" => no sample
#
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1       # without it torchrun's restarts of a failed node fail
if [ "$ACCELERATOR" = cpu ]; then # measured: records/2026-11-21-cpu-demo
    export MALLOC_MMAP_MAX_="${MALLOC_MMAP_MAX_:-0}"       # memory is kept for the next step, not given back and cleared again
    export MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-100000000000}"
fi
case $N_NODE in '' | *[!0-9]*) die "N_NODE=$N_NODE is not a number of nodes; use 1, 2, ..., or unset N_NODE for this machine alone" ;; esac
if [ "$N_NODE" -gt 1 ] && [ -z "${NODE_RANK:-}${SLURM_NODEID:-}${GROUP_RANK:-}" ]; then
    address=$(hostname -I 2>/dev/null | cut -d ' ' -f 1)
    echo "$N_NODE nodes of $GPU_PER_NODE: start this on each node (same files, same knobs; MASTER_ADDR is the address of node 0):"
    node=0
    while [ "$node" -lt "$N_NODE" ]; do
        echo "  NODE_RANK=$node MASTER_ADDR=${MASTER_ADDR:-${address:-ADDRESS}} MASTER_PORT=${MASTER_PORT:-29500} N_NODE=$N_NODE GPU_PER_NODE=$GPU_PER_NODE $0"
        node=$((node + 1))
    done
    exit 2
fi

set -f # TRAIN_FLAGS are words, not names of files
forward_signals "$PYTHON" train.py --load_model "0" --wandb "$WANDB" --proj_dir "$PROJ_DIR" --my_testing "$MODEL_TYPE" \
    --ctx_len "$CTX_LEN" --train_stage 3 --epoch_begin 0 \
    --data_file "$DATA_FILE" --data_type "binidx" --vocab_size "$VOCAB_SIZE" --my_exit_tokens "$EXIT_TOKENS" --magic_prime 0 \
    --num_nodes "$N_NODE" --micro_bsz "$M_BSZ" --n_layer "$N_LAYER" --n_embd "$N_EMBD" --head_size "$HEAD_SIZE" --kernel "$KERNEL" \
    --lr_init "$LR_INIT" --lr_final "$LR_FINAL" --warmup_steps 10 --beta1 0.9 --beta2 "$BETA_2" --adam_eps "$ADAM_EPS" \
    --weight_decay "$W_DECAY" --epoch_save "$EPOCH_SAVE" --epoch_samples "$EPOCH_SAMPLES" --save_minutes "$SAVE_MINUTES" --head_chunk "$HEAD_CHUNK" \
    --accelerator "$ACCELERATOR" --devices "$GPU_PER_NODE" --precision "$PRECISION" --strategy "$STRATEGY" --grad_cp "$GRAD_CP" --compile "$COMPILE" --cuda_graphs "$CUDA_GRAPHS" --enable_progress_bar True $TRAIN_FLAGS $loaded || exit

if [ -n "$PROMPT" ] && [ -e "$PROJ_DIR/rwkv-final.pth" ] && [ "${NODE_RANK:-${SLURM_PROCID:-${RANK:-0}}}" = 0 ]; then # the first of all nodes alone; after --dry_run or --max_steps there is no model
    forward_signals "$PYTHON" -m rwkvlm generate --model "$PROJ_DIR/rwkv-final.pth" --prompt "$PROMPT" --length 100 --seed 1 || {
        case $status in 129 | 130 | 143) exit $status ;; esac # a signal to the script
        echo "no sample; the training has ended well" >&2 # a prompt outside the vocabulary, say
    }
fi
