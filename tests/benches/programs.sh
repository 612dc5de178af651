#!/bin/bash
# Measures served programs on a private broker. Those that run once: in turn with the limit (posix_spawn and wait in C) and with
# amqp-consume, which only consumes. Those that stay: in turn with fib, and with servers of the same function on pika and
# amqplib. Prints medians with minimum and maximum.
#   tests/benches/programs.sh FOLDER [ROUNDS]   FOLDER has the optimised programs
set -euo pipefail

folder=$1
rounds=${2:-5}
count=1000
here=$(cd "$(dirname "$0")" && pwd)
peers=$(cd "${CARGO_TARGET_DIR:-$here/../../target}/peers" && pwd)
spawn=$peers/c-spawn
node=$(mktemp -d)/node
trap '"$here/../broker.sh" stop "$node" >/dev/null; kill $(jobs -p) 2>/dev/null || true' EXIT
AMQP_URL=$("$here/../broker.sh" start "$node" | tail -n 1)
export AMQP_URL

# Median, minimum and maximum of the numbers on standard input.
median() { sort -g | awk '{ a[NR] = $1 } END { printf "%.0f (%.0f to %.0f)", a[int((NR + 1) / 2)], a[1], a[NR] }'; }

# The value of a key in JSON on standard input.
value() { sed "s/.*\"$1\":\([0-9.]*\).*/\1/"; }

call() { "$folder/rpc-client" --queue "$queue" --data x "$@" --summary=json 2>&1 >/dev/null; }

measure() { # PROGRAM WORKERS
    queue=bench-$1-$2
    "$folder/rpc-server" -q --queue "$queue" --workers "$2" -- "$1" >/dev/null 2>&1 &
    local server=$! round limit=() ours=() consume=() p50=()
    until call --repeat 10 >/dev/null; do sleep 0.2; done
    for round in $(seq "$rounds"); do
        limit+=("$("$spawn" $count "$2" "$1")")
        ours+=("$(call --repeat $count -j 64 | value calls_per_second)")
        p50+=("$(call --repeat 300 -j 1 | value p50 | awk '{ print $1 * 1000 }')")
        consume+=("$(consume "$1" "$2")")
    done
    kill $server
    wait $server || true
    printf '| %s, %d at once | %s | %s | %s | %s |\n' "$1" "$2" "$(printf '%s\n' "${ours[@]}" | median)" \
        "$(printf '%s\n' "${limit[@]}" | median)" "$(printf '%s\n' "${consume[@]}" | median)" \
        "$(printf '%s\n' "${p50[@]}" | median)"
}

# Runs per second of amqp-consume: as many processes as workers share the messages.
consume() { # PROGRAM WORKERS
    local begun number url=$AMQP_URL
    amqp-declare-queue -u "$url" -q consumed >/dev/null
    yes x | head -n $count | amqp-publish -u "$url" -r consumed -l
    begun=$(date +%s%N)
    for number in $(seq "$2"); do
        amqp-consume -u "$url" -q consumed -p 1 -c $((count / $2)) "$1" >/dev/null 2>&1 &
    done
    wait $(jobs -p | tail -n "$2")
    echo $((count * 1000000000 / ($(date +%s%N) - begun)))
    amqp-delete-queue -u "$url" -q consumed >/dev/null
}

# Starts a server of a queue that exists: fib, a persistent program (ours), or a program on a library (theirs). Two workers, or
# two processes.
start() { # KIND PREFETCH
    local options=(-q --queue "$queue" --workers 2 --prefetch "$2")
    export RPC_QUEUE=$queue RPC_PREFETCH=$2
    case $1 in
        fib) "$folder/rpc-server" "${options[@]}" ;;
        ours-python) "$folder/rpc-server" "${options[@]}" --persistent -- "$peers/python/bin/python" "$here/upper/handler.py" ;;
        ours-node) "$folder/rpc-server" "${options[@]}" --persistent -- node "$here/upper/handler.js" ;;
        pika) "$peers/python/bin/python" "$here/upper/server.py" & exec "$peers/python/bin/python" "$here/upper/server.py" ;;
        amqplib) export NODE_PATH=$peers/node/node_modules; node "$here/upper/server.js" & exec node "$here/upper/server.js" ;;
    esac >/dev/null 2>&1
}

# The calls per second with 64 in flight, and the median latency of one at a time in microseconds.
ask() { # KIND PREFETCH
    local kind=$1 data=(--data x) many=20000 pid
    [ "$kind" != fib ] || data=(10)
    start "$kind" "$2" &
    pid=$!
    until [ "$("$folder/rpc-client" --queue "$queue" --check -o json | value consumers)" = 2 ]; do sleep 0.2; done
    rates+=("$("$folder/rpc-client" --queue "$queue" "${data[@]}" --repeat $many -j 64 --summary=json 2>&1 >/dev/null | value calls_per_second)")
    p50s+=("$("$folder/rpc-client" --queue "$queue" "${data[@]}" --repeat 500 -j 1 --summary=json 2>&1 >/dev/null | value p50 | awk '{ print $1 * 1000 }')")
    pkill -P "$pid" || true
    kill "$pid" 2>/dev/null || true
    wait "$pid" 2>/dev/null || true
    until [ "$("$folder/rpc-client" --queue "$queue" --check -o json | value consumers)" = 0 ]; do sleep 0.2; done
}

compare() { # PREFETCH
    local kind round rates p50s
    queue=stay-$1
    "$folder/rpc-server" -q --queue "$queue" --queue-type transient >/dev/null 2>&1 & # declares it
    until call --repeat 1 -t 1 >/dev/null; [ $? != 4 ]; do sleep 0.2; done
    kill $!
    wait $! || true
    for kind in fib ours-python pika ours-node amqplib; do : >"$node/$kind.rates"; : >"$node/$kind.p50s"; done
    for round in $(seq "$rounds"); do
        for kind in fib ours-python pika ours-node amqplib; do
            rates=() p50s=()
            ask "$kind" "$1"
            echo "${rates[0]}" >>"$node/$kind.rates"
            echo "${p50s[0]}" >>"$node/$kind.p50s"
        done
    done
    for kind in fib ours-python pika ours-node amqplib; do
        printf '| %s | %s | %s | %s |\n' "$kind" "$1" "$(median <"$node/$kind.rates")" "$(median <"$node/$kind.p50s")"
    done
}

if [ "${ONLY:-}" = stay ]; then
    echo '| programs that stay, 2 at once | prefetch | calls/s, 64 in flight | one at a time, p50 in us |'
    echo '| --- | --- | --- | --- |'
    for prefetch in 1 64; do compare $prefetch; done
    exit
fi

# The peak memory of a process in MiB.
peak() { awk '/VmHWM/ { printf "%d MiB", $2 / 1024 }' "/proc/$1/status"; }

echo '| program | rpc-server, runs/s | the limit, runs/s | amqp-consume, runs/s | one at a time, p50 in us |'
echo '| --- | --- | --- | --- | --- |'
for program in true cat; do
    for workers in 1 2; do measure "$program" "$workers"; done
done

queue=flat
"$folder/rpc-server" -q --queue $queue --workers 2 -- true >/dev/null 2>&1 &
server=$!
until call --repeat 10 >/dev/null; do sleep 0.2; done
state() { awk '/VmRSS/ { printf "%d KiB, ", $2 }' "/proc/$server/status"; echo "$(ls "/proc/$server/fd" | wc -l) descriptors"; }
call --repeat 1000 >/dev/null
echo "after 1,000 runs: $(state)"
call --repeat 20000 >/dev/null
echo "after 20,000 more: $(state)"
kill $server

queue=large
"$folder/rpc-server" -q --queue $queue --workers 4 --max-request 64MiB --max-reply 64MiB -- cat >/dev/null 2>&1 &
server=$!
until call --repeat 1 >/dev/null; do sleep 0.2; done
head -c 64M /dev/zero >"$node/large"
/usr/bin/time -f 'rpc-client: peak %M KiB' "$folder/rpc-client" --queue $queue --data "@$node/large" --repeat 4 -j 4 -t 5m 2>&1 >/dev/null
echo "64 MiB each way, 4 at once: rpc-server: peak $(peak $server)"
kill $server

echo
echo '| programs that stay, 2 at once | prefetch | calls/s, 64 in flight | one at a time, p50 in us |'
echo '| --- | --- | --- | --- |'
for prefetch in 1 64; do compare $prefetch; done
