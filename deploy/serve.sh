#!/bin/sh
# Start vLLM over a tree: the container's entry point, and the service's ExecStart.
# Its arguments are vLLM's own, and come after those of the tree.
#
#   SERVE_ZOO        the tree's folder, or a link to it that a release switches
#   SERVE_BASE       the base model; without it the one that the tree names
#   SERVE_CACHE      a folder for flattened adapters, on a disk of this machine
#   SERVE_CACHE_GB   the most that it may hold, in GiB (10)
#   SERVE_MAX_RANK   the largest rank of a path, later releases included
#   SERVE_ALLOW      the paths that clients may ask for, separated by spaces (every path)
#   SERVE_HOST, SERVE_PORT   where to listen (127.0.0.1, 8000)
set -euf  # f: the patterns of SERVE_ALLOW are not for this shell to expand

: "${SERVE_ZOO:?names the folder of the tree}" "${SERVE_CACHE:?names a folder for adapters}"

allow=
for pattern in ${SERVE_ALLOW:-}; do
    allow="$allow --allow $pattern"
done
# shellcheck disable=SC2086  # $allow is several words
start=$(lora-tree vllm-args "$SERVE_ZOO" --cache "$SERVE_CACHE" --cache-gb "${SERVE_CACHE_GB:-10}" \
    ${SERVE_MAX_RANK:+--max-rank "$SERVE_MAX_RANK"} $allow)

# It prints one line for each variable, quoted for a shell, and the command in the last line.
eval "${start%
*}"
command=${start##*
}

set -- --host "${SERVE_HOST:-127.0.0.1}" --port "${SERVE_PORT:-8000}" "$@"
if [ -n "${SERVE_BASE:-}" ]; then
    set -- --model "$SERVE_BASE" "$@"
elif [ "${command#* --model BASE }" != "$command" ]; then
    echo "serve.sh: the tree names no base: set SERVE_BASE" >&2
    exit 1
fi
# exec: the server takes this process's place, so that signals reach it.
eval "exec $command \"\$@\""
