#!/bin/sh
# Runs the fast tests, two at a time; ./test.sh --all the slow ones too. Arguments go to pytest, one test at a time: ./test.sh tests/ops -k wkv7
CDPATH= cd "$(dirname "$0")" || exit 1
WITH_TESTS=1
. RWKV-v7/env.sh

run() { forward_signals "$PYTHON" -m pytest -p no:cacheprovider --durations=15 "$@"; }

among="not slow and "
if [ "${1:-}" = --all ]; then
    shift
    among=
fi
if [ $# -gt 0 ]; then
    run -m "${among% and }" "$@"
    exit
fi
# Most tests keep one core busy; a file stays in one process, which makes once what its tests share. Those that measure time come afterwards, with nothing beside them.
run -n 2 --dist loadfile --no-loadscope-reorder -m "${among}not alone"
shared=$?
[ $shared -le 1 ] || exit $shared
# shellcheck disable=SC2046
run -m "${among}alone" $(grep -rl --include='*.py' 'mark\.alone' tests) # to collect all files again would take a quarter of a minute
alone=$?
[ $alone -ne 5 ] || [ -z "$among" ] || alone=0 # there are none among the fast ones
exit $((shared ? shared : alone))
