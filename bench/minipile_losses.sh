#!/bin/sh
# Trains the official MiniPile recipe on a GPU and compares the losses of its mini-epochs with the published ones (RWKV-LM, RWKV-v7/train_temp).
#
#   bench/minipile_losses.sh                  until mini-epoch 11, then it stops the run; the same command goes on
#   MINI_EPOCHS=3 bench/minipile_losses.sh    only the first three
#   bench/minipile_losses.sh --compare DIR    compares what a run in DIR has written so far
#
# Needs data/minipile.bin and .idx (demo-training-prepare.sh fetches them). The knobs of demo-training-run.sh hold; the recipe itself stays as it is.
CDPATH= cd "$(dirname "$0")/.." || exit 1
if [ -z "${PYTHON:-}" ]; then
    . RWKV-v7/env.sh
fi
export PYTHON
exec "$PYTHON" bench/minipile_losses.py "$@"
