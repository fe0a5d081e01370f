#!/bin/sh
# Runs the fast tests; ./test.sh --all the slow ones too. Further arguments go to pytest: ./test.sh tests/ops -k wkv7
cd "$(dirname "$0")" || exit 1
WITH_TESTS=1
. RWKV-v7/env.sh

if [ "${1:-}" = --all ]; then
    shift
    exec "$PYTHON" -m pytest -p no:cacheprovider --durations=15 "$@"
fi
exec "$PYTHON" -m pytest -p no:cacheprovider --durations=15 -m "not slow" "$@"
