#!/bin/sh
# Start tritonserver on /models. Further arguments are passed on to it.
# HTTP and metrics are Triton's behind front.py. VIT_FRONT says where each listens, and at which port of
# loopback Triton does.
#
# Triton never starts the process of a Python model (a "stub") again, stays ready and fails its
# requests. So when one has ended, all ends with exit code 1, for Docker or Kubernetes to restart.
set -eu
# Nobody needs these calls from outside, and Triton has no switch to turn them all off: they want a
# key, and where none is given nobody knows it.
key="vit-admin-key=${VIT_ADMIN_KEY:-$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')}"
closed=shared-memory,model-repository,trace,logging
# What a killed server leaves in /dev/shm stays there for a pod's next container.
shm="vit-$$-"
rm -f "/dev/shm/$shm"*

repository=${MODEL_REPOSITORY:-/models}
front=${VIT_FRONT:-0.0.0.0:8000=18000 0.0.0.0:8002=18002}  # HTTP, metrics
http=${front%% *} metrics=${front##* }
# preprocess asks there what waits for vit.
export VIT_METRICS="127.0.0.1:${metrics##*=}"

python3 "${VIT_FRONT_PY:-/opt/vit/front.py}" "$repository" "$http" "$metrics" &
front=$!

tritonserver \
    --model-repository="$repository" \
    --model-control-mode=none \
    --disable-auto-complete-config \
    --grpc-restricted-protocol="$closed:$key" \
    --http-restricted-api="$closed:$key" \
    --grpc-max-connection-age=30000 \
    --backend-config=python,shm-region-prefix-name="$shm" \
    --backend-config=python,shm-default-byte-size=67108864 \
    --backend-config=python,shm-growth-byte-size=67108864 \
    "$@" \
    --http-address=127.0.0.1 --http-port="${http##*=}" \
    --metrics-address=127.0.0.1 --metrics-port="${metrics##*=}" &
triton=$!
stopping=
trap 'stopping=1; kill -TERM "$triton" 2>/dev/null || :' TERM INT

alive() {  # and no zombie
    { read -r _ _ state _ < "/proc/$1/stat"; } 2>/dev/null && [ "$state" != Z ]
}

stubs() {  # their pids; any thread of tritonserver may have started them
    for pid in $(cat "/proc/$triton/task/"*/children 2>/dev/null); do
        { read -r name < "/proc/$pid/comm"; } 2>/dev/null || continue
        case $name in triton_python_b*) echo "$pid" ;; esac
    done
}

watched=
while alive "$triton"; do
    if ! alive "$front"; then
        echo "serve.sh: front.py, which passes HTTP on, has ended, so the server ends" >&2
        kill -KILL "$triton"
        exit 1
    fi
    for pid in $watched; do
        alive "$pid" && continue
        sleep 3  # tritonserver may be about to end as well: it was stopped, or a model did not load
        if alive "$triton" && [ -z "$stopping" ]; then
            echo "serve.sh: the process of a Python model has ended (pid $pid), so the server ends" >&2
            kill -KILL "$triton"
            exit 1
        fi
        break
    done
    watched=$(stubs)
    sleep 1
done
code=0
wait "$triton" || code=$?
kill "$front"
exit "$code"
