#!/bin/sh
# Runs the fast tests; ./test.sh --all the slow ones too. Further arguments go to pytest: ./test.sh tests/ops -k wkv7
# Without them two pytests share the tests (tests/side_by_side.py).
cd "$(dirname "$0")" || exit 1
WITH_TESTS=1
. RWKV-v7/env.sh

tests="not slow"
if [ "${1:-}" = --all ]; then
    shift
    tests=
fi
[ $# -gt 0 ] || set -- --side-by-side
exec "$PYTHON" -m pytest -p no:cacheprovider --durations=15 -m "$tests" "$@"
