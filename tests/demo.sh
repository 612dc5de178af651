#!/bin/bash
# The demo: starts a broker (unless AMQP_URL names one) and a server, calls it, and prints a transcript. It stops all
# that it started when it exits.
#   tests/demo.sh PROGRAM_FOLDER
set -euo pipefail

programs=$1
here=$(dirname "$0")
scratch=$(mktemp -d)

clean_up() {
    trap - EXIT INT TERM
    [ -z "${server_pid:-}" ] || { kill "$server_pid" 2>/dev/null && wait "$server_pid"; } || true
    [ -z "${broker_pid:-}" ] || { exec 3>&-; wait "$broker_pid"; } || true
    rm -rf "$scratch"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# Waits until file $1 has a line; fails if process $2 ends first, or after $3 seconds.
wait_for_line() {
    local deadline=$((SECONDS + $3))
    until [ -s "$1" ]; do
        if [ $SECONDS -ge $deadline ] || ! kill -0 "$2" 2>/dev/null; then
            cat "$scratch"/*.err >&2
            echo "demo: failed, see the error above" >&2
            exit 1
        fi
        sleep 0.05
    done
}

queue=rpc_queue
if [ -n "${AMQP_URL:-}" ]; then
    echo "using the broker of AMQP_URL ..."
    queue=rpc_demo # others may have a server on rpc_queue
else
    echo "starting a private RabbitMQ (some seconds) ..."
    mkfifo "$scratch/hold" # the node runs until this pipe is closed
    setsid "$here/broker.sh" run "$scratch/node" <"$scratch/hold" >"$scratch/url" 2>"$scratch/broker.err" &
    broker_pid=$!
    exec 3>"$scratch/hold"
    wait_for_line "$scratch/url" "$broker_pid" 130
    AMQP_URL=$(cat "$scratch/url")
    export AMQP_URL
fi

setpriv --pdeathsig TERM "$programs/rpc-server" --queue "$queue" >"$scratch/server" 2>"$scratch/server.err" 3>&- &
server_pid=$!
wait_for_line "$scratch/server" "$server_pid" 15
call() { "$programs/rpc-client" --queue "$queue" "$@" 30 3>&-; }
call --output text >"$scratch/client" 2>&1 || { cat "$scratch/client" >&2; exit 1; }
answer=$(call)
kill "$server_pid"
wait "$server_pid"
server_pid=

cat <<EOF

\$ rpc-server
$(cat "$scratch/server")

\$ rpc-client 30
$(cat "$scratch/client")

\$ answer=\$(rpc-client 30); echo "\$answer"
$answer
EOF
