#!/bin/sh
# Trains on the Pile: demo-training-run.sh with these knobs (each can be set in the environment too).
# The first group must be the same as in demo-training-prepare-v7-pile.sh.
#
DATA=pile
: "${PILE_PREFIX:=data/pile_20B_tokenizer_text_document}" # where the two files are; relative paths are meant from this script's folder
#
: "${MODEL_TYPE:=x070}" # x070 => rwkv-7.0
: "${N_LAYER:=12}"
: "${N_EMBD:=768}"
: "${CTX_LEN:=4096}"
: "${PROJ_DIR:=out/L$N_LAYER-D$N_EMBD-$MODEL_TYPE-pile}" # set output folder
#
: "${M_BSZ:=30}" # for 80G VRAM GPUs
: "${LR_INIT:=8e-4}"
: "${LR_FINAL:=3e-5}"
: "${W_DECAY:=0.1}"
: "${EPOCH_SAVE:=50}" # save every 50 "miniepochs" (1 miniepoch = 40320 * ctx_len tokens) => decrease if your GPU is weak
: "${EPOCH_SAMPLES:=40320}"
: "${EXIT_TOKENS:=332115325534}"
: "${PRECISION:=bf16}"
: "${PROMPT:=}" # no sample: the Pile's vocabulary is another one
#
: "${ACCELERATOR:=gpu}"
: "${N_NODE:=1}"       # number of nodes
: "${GPU_PER_NODE:=8}" # number of GPUs per node
#
. "$(dirname "$(readlink -f "$0")")/demo-training-run.sh"
