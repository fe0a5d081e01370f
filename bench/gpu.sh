#!/bin/sh
# Everything that only a machine with a GPU can tell: bench/gpu.sh STEP... with the steps tests, sanitize, kernels, step, train, others
# (none: all of them). tests: what has a form for a GPU; others: all test files, for an hour.
#
#   bench/gpu.sh --minutes 25                        all steps, as far as 25 minutes go; the same command goes on where it stopped
#   bench/gpu.sh kernels --peer fla=/src/flash-linear-attention --peer wind=/src/wind_rwkv --peer official=/src/RWKV-LM/RWKV-v7/train_temp
#   bench/gpu.sh --device cpu --small                a rehearsal without a GPU: the same code on tiny shapes; it proves nothing about a GPU
#
# Nothing is fetched. PYTHON=/path/to/python is used as it is, whatever it has; without it the interpreter is found, or made, as for the demo.
# The result: out/gpu/results.json (chip, driver, versions, commit, every step) and out/gpu/logs/. See bench/gpu.py.
CDPATH= cd "$(dirname "$0")/.." || exit 1
if [ -z "${PYTHON:-}" ]; then
    WITH_TESTS=1
    . RWKV-v7/env.sh
fi
export PYTHON PYTHONPATH="$PWD/RWKV-v7${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" bench/gpu.py "$@"
