#!/bin/sh
# Start tritonserver on /models. Further arguments are passed on to it.
set -eu
# Nobody needs these calls from outside, and Triton has no switch to turn them all off: they want a
# key, and where none is given nobody knows it.
key="vit-admin-key=${VIT_ADMIN_KEY:-$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')}"
closed=shared-memory,model-repository,trace,logging
exec tritonserver \
    --model-repository="${MODEL_REPOSITORY:-/models}" \
    --model-control-mode=none \
    --disable-auto-complete-config \
    --grpc-restricted-protocol="$closed:$key" \
    --http-restricted-api="$closed:$key" \
    --grpc-max-connection-age=30000 \
    --backend-config=python,shm-default-byte-size=67108864 \
    --backend-config=python,shm-growth-byte-size=67108864 \
    "$@"
