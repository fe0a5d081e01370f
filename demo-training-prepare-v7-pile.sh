#!/bin/sh
# Prepares a training on the Pile: demo-training-prepare.sh with these knobs (each can be set in the environment too).
#
# get these files first:
# pile_20B_tokenizer_text_document.bin (664230651068 bytes)
# pile_20B_tokenizer_text_document.idx (4212099722 bytes)
#
DATA=pile
: "${PILE_PREFIX:=data/pile_20B_tokenizer_text_document}" # where they are; relative paths are meant from this script's folder
#
: "${MODEL_TYPE:=x070}" # x070 => rwkv-7.0
: "${N_LAYER:=12}"
: "${N_EMBD:=768}"
: "${CTX_LEN:=4096}"
: "${PROJ_DIR:=out/L$N_LAYER-D$N_EMBD-$MODEL_TYPE-pile}" # set output folder
#
. "$(dirname "$(readlink -f "$0")")/demo-training-prepare.sh"
