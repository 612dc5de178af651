#!/bin/bash
# A private RabbitMQ node: own name, ports, folders, Erlang cookie and epmd, all below DIR.
#   tests/broker.sh run DIR [PORT]     prints its URL when it is ready; runs until standard input ends
#   tests/broker.sh start DIR [PORT]   the same in the background, until `stop`
#   tests/broker.sh stop DIR
#   tests/broker.sh ctl DIR ARGUMENT...   rabbitmqctl on that node
# NODE_PLUGINS are the plugins to enable, with commas between them.
# Whoever runs a node holds the other end of its standard input: when that process ends, however it
# ends, the node is stopped and DIR removed. Started in the background it runs until it is stopped.
set -euo pipefail

die() { echo "broker.sh: $*" >&2; exit 1; }

server=/usr/lib/rabbitmq/bin/rabbitmq-server # not the wrappers on the PATH, which change user
rabbitmqctl=/usr/lib/rabbitmq/bin/rabbitmqctl
boot_deadline=120                            # seconds

is_open() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

# The first of eight free ports in a row, for the node and what a test has it listen on. They are below the
# ephemeral ones, so that no client's end of a connection takes one meanwhile.
free_ports() {
    local first port
    while :; do
        first=$((20000 + RANDOM % 1500 * 8))
        for port in $(seq "$first" $((first + 7))); do
            is_open "$port" && continue 2
        done
        echo "$first"
        return
    done
}

# Whether AMQP is spoken there: a broker answers the protocol header with a method frame, type 1.
speaks_amqp() {
    local type
    exec 4<>"/dev/tcp/127.0.0.1/$1" || return 1
    printf 'AMQP\0\0\x09\x01' >&4
    read -r -N 1 -t 5 type <&4 || true
    exec 4>&-
    [ "${type:-}" = $'\x01' ]
} 2>/dev/null

clean_up() {
    trap - EXIT INT TERM
    # The node has nothing to save, so it is not asked politely. Only what we started is ended.
    # The node is a script that waits for the Erlang machine: a process group of its own.
    kill -9 ${node_pid:+-"$node_pid"} ${epmd_pid:-} ${stdin_pid:-} 2>/dev/null || true
    wait 2>/dev/null || true
    rm -rf "$dir"
}

run() {
    [ -x "$server" ] || die "no $server: run 'tests/setup.sh broker' first"
    mkdir -p "$dir"
    [ -z "$(ls -A "$dir")" ] || die "$dir is not empty: is another node running there? stop that first"
    exec 3<&0
    trap clean_up EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    echo $$ >"$dir/pid"

    local ports port epmd_port dist_port
    [[ ${1:-5672} =~ ^[0-9]{1,5}$ && ${1:-5672} -ge 1 && ${1:-5672} -le 65535 ]] || die "'$1' is no port"
    ports=$(free_ports)
    port=${1:-$ports} epmd_port=$((ports + 1)) dist_port=$((ports + 2))
    is_open "$port" && die "port $port is in use"
    echo "[${NODE_PLUGINS:-}]." >"$dir/enabled_plugins"
    cat >"$dir/rabbitmq.conf" <<-EOF
	listeners.tcp.1 = 127.0.0.1:$port
	listeners.tcp.2 = ::1:$port
	log.file.level = info
	EOF
    [ -e /proc/net/if_inet6 ] || sed -i '/::1/d' "$dir/rabbitmq.conf"

    # Erlang finds its cookie below HOME and its epmd by the port; the rest is RabbitMQ's.
    printf '%s\n' "HOME=$dir" "ERL_EPMD_PORT=$epmd_port" "RABBITMQ_NODENAME=rpc-$port@localhost" \
        RABBITMQ_CONF_ENV_FILE=/dev/null >"$dir/ctl.env"
    export HOME=$dir ERL_EPMD_PORT=$epmd_port ERL_EPMD_ADDRESS=127.0.0.1 \
        RABBITMQ_NODENAME="rpc-$port@localhost" RABBITMQ_DIST_PORT=$dist_port \
        RABBITMQ_CONFIG_FILE=$dir/rabbitmq.conf RABBITMQ_ADVANCED_CONFIG_FILE=$dir/none \
        RABBITMQ_CONF_ENV_FILE=$dir/none RABBITMQ_ENABLED_PLUGINS_FILE=$dir/enabled_plugins \
        RABBITMQ_MNESIA_BASE=$dir/data RABBITMQ_LOG_BASE=$dir/log RABBITMQ_GENERATED_CONFIG_DIR=$dir/config \
        RABBITMQ_PID_FILE=$dir/node.pid ERL_CRASH_DUMP=$dir/erl_crash.dump \
        RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS='-kernel inet_dist_use_interface {127,0,0,1}'
    unset RABBITMQ_NODE_PORT RABBITMQ_NODE_IP_ADDRESS RABBITMQ_LOGS

    epmd -port "$epmd_port" </dev/null >"$dir/epmd.out" 2>&1 3<&- &
    epmd_pid=$!
    setsid "$server" </dev/null >"$dir/node.out" 2>&1 3<&- &
    node_pid=$!
    echo "$node_pid $epmd_pid" >"$dir/pids"

    until speaks_amqp "$port"; do
        kill -0 "$node_pid" 2>/dev/null || { cat "$dir/node.out" >&2; die "the node did not start"; }
        [ "$SECONDS" -lt "$boot_deadline" ] || { cat "$dir/node.out" >&2; die "the node was not up in $boot_deadline s"; }
        sleep 0.1
    done
    echo "amqp://localhost:$port"

    cat <&3 >/dev/null &
    stdin_pid=$!
    echo "$stdin_pid" >>"$dir/pids"
    wait -n "$node_pid" "$stdin_pid" || true
    if ! kill -0 "$node_pid" 2>/dev/null; then
        tail -n 30 "$dir/node.out" >&2
        die "the node ended by itself: see above"
    fi
}

ctl() {
    [ -s "$dir/ctl.env" ] || die "no node runs in $dir"
    mapfile -t environment <"$dir/ctl.env"
    env "${environment[@]}" "$rabbitmqctl" --quiet "$@"
}

# A process id may be somebody else's by now: ours has the folder among its arguments.
is_running() { grep -qszxF -- "$dir" "/proc/$(cat "$dir/pid" 2>/dev/null)/cmdline"; }

start() {
    if ! is_running; then
        stop # removes what a killed one has left
        mkfifo "$dir.stdin"
        trap stop INT TERM
        # Opened for reading and writing, the pipe never ends: this node runs until `stop`.
        setsid "$0" run "$dir" "$@" 0<>"$dir.stdin" >"$dir.url" 2>"$dir.err" &
        until [ -s "$dir.url" ]; do
            kill -0 $! 2>/dev/null || { cat "$dir.err" >&2; stop; exit 1; }
            sleep 0.1
        done
    fi
    cat "$dir.url"
}

stop() {
    local pid
    if [ -e "$dir" ] && [ ! -e "$dir/pid" ] && [ -n "$(ls -A "$dir")" ]; then
        die "$dir is no folder of a node's"
    fi
    if is_running; then
        pid=$(cat "$dir/pid")
        kill "$pid" 2>/dev/null || true
        while is_running; do sleep 0.1; done
    fi
    # Should it have been killed, what it started is still there, and known by its folder.
    for pid in $(cat "$dir/pids" 2>/dev/null); do
        if grep -qszxF -- "HOME=$dir" "/proc/$pid/environ"; then kill -9 -- "-$pid" "$pid" 2>/dev/null || true; fi
    done
    rm -rf "$dir" "$dir".{stdin,url,err}
}

[ $# -ge 2 ] || die "usage: broker.sh run|start|stop|ctl DIR [PORT or ARGUMENT...]"
command=$1
mkdir -p "$(dirname "$2")"
dir=$(cd "$(dirname "$2")" && pwd)/$(basename "$2")
shift 2
case $command in
    run | start | stop | ctl) "$command" "$@" ;;
    *) die "unknown command '$command'" ;;
esac
