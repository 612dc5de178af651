#!/bin/bash
# Installs the package of `make deb` in a clean Debian 12, which systemd boots in a container, and runs there, as they stand,
# the commands for root in rpc-server/README.md. Then it tests the servers that they have started. Needs root.
#   tests/test-deb.sh TARGET
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)

# Prints the commands (blocks of language sh) in the guide's section "As a service".
guide() {
    awk '/^## /{ inside = /^## As a service/ } /^```/{ shell = inside && /^```sh$/; next } shell' "$here/../rpc-server/README.md"
}

outside() {
    local target scratch url keep_unit=()
    target=$(cd "$1" && pwd)
    [ "$(id -u)" = 0 ] || { echo "test-deb: systemd-nspawn needs root: run as root" >&2; exit 1; }
    scratch=$(mktemp -d)
    # shellcheck disable=SC2064 # expanded now
    trap "'$here/broker.sh' stop '$scratch/broker' >/dev/null; rm -rf '$scratch'" EXIT
    url=$("$here/broker.sh" start "$scratch/broker")
    "$here/broker.sh" ctl "$scratch/broker" -q add_user server secret
    "$here/broker.sh" ctl "$scratch/broker" -q set_permissions server '.*' '.*' '.*'

    cp "$target"/debian/*.deb "$here/test-deb.sh" "$scratch"
    guide | sed "s/@localhost/@${url#amqp://}/" >"$scratch/guide.sh"
    cat >"$scratch/test.service" <<END
[Unit]
SuccessAction=exit
FailureAction=exit
FailureActionExitStatus=1
[Service]
Type=oneshot
WorkingDirectory=/test
Environment=AMQP_URL=$url
ExecStart=bash /test/test-deb.sh inside
StandardOutput=file:/test/log
StandardError=inherit
END
    # Without systemd on this machine, there is no unit for the container.
    [ -d /run/systemd/system ] || keep_unit=(--keep-unit)
    flock /run/lock/rpc-test-deb timeout --foreground 300 systemd-nspawn --quiet --register=no "${keep_unit[@]}" --console=pipe \
        --directory="$target/container" --volatile=overlay --bind="$scratch:/test" \
        --bind-ro="$scratch/test.service:/run/systemd/system/test.service" --boot -- --unit=test.service \
        </dev/null >"$scratch/console" 2>&1 || { cat "$scratch/console" "$scratch/log" >&2; echo "test-deb: failed" >&2; exit 1; }
    grep '^test-deb: ' "$scratch/log"
}

fail() { echo "FAILED: $*"; systemctl status --no-pager 'rpc-server@*'; journalctl --no-pager -n 50; exit 1; }
passed() { echo "test-deb: $*"; }

# Fails unless $1 is $2.
equal() { [ "$1" = "$2" ] || fail "'$1' is not '$2'"; }

# Waits until the command succeeds.
wait_until() {
    local deadline=$((SECONDS + 30))
    until "$@" >/dev/null; do
        [ $SECONDS -lt $deadline ] || fail "timed out: $*"
        sleep 0.1
    done
}

show() { systemctl show -P "$1" "rpc-server@$2"; }
has_log() { journalctl -u "rpc-server@$1" "${@:3}" | grep -e "$2" >/dev/null; }

inside() {
    bash -eux guide.sh
    [ -e /usr/share/man/man1/rpc-server.1.gz ] || fail "no man page"
    [ -e /usr/share/bash-completion/completions/rpc-client ] || fail "no completions"
    equal "$(rpc-client --queue count --data 'to be or not to be')" 6
    equal "$(show StatusText count)" "connected to ${AMQP_URL#amqp://}"
    equal "$(show NRestarts count)" 0
    passed "the guide's commands start a server: $(rpc-server --version), $(systemctl --version | head -n 1)"

    # A second instance: fib, as another user.
    cp /etc/rpc-server/count.password /etc/rpc-server/fib.v2.password
    sed '/ARGS/d' /etc/rpc-server/count.env >/etc/rpc-server/fib.v2.env
    systemctl start rpc-server@fib.v2
    equal "$(rpc-client --queue fib.v2 30)" 832040
    [ "$(stat -c %u "/proc/$(show MainPID fib.v2)")" != "$(stat -c %u "/proc/$(show MainPID count)")" ] || fail "one user"
    passed "a second instance answers fib(30) = 832040"

    # A program in the sandbox cannot do what the guide says; a stop waits for it.
    cat >>/etc/rpc-server/count.env <<'END'
RPC_SERVER_ARGS="-- sh -c 'touch /var/tmp/x && ! touch /var/x /home/x /etc/x; cat /etc/rpc-server/count.password; echo runs >&2; sleep 3; echo done'"
END
    systemctl restart rpc-server@count
    rpc-client --queue count --data '' >answer &
    wait_until has_log count ": runs$"
    systemctl stop rpc-server@count
    wait "$!" || fail "the request failed"
    equal "$(cat answer)" "done"
    equal "$(show Result count)" success
    has_log count 'count.password: Permission denied' || fail "a program reads the password's file"
    for file in /var/x /etc/x; do
        has_log count "'$file': Read-only file system" || fail "a program writes $file"
    done
    passed "a stop waits for the program of a request"

    # What restarting cannot mend is not restarted.
    echo wrong >/etc/rpc-server/count.password
    ! systemctl start rpc-server@count || fail "started with a wrong password"
    equal "$(show ActiveState count) $(show ExecMainStatus count) $(show NRestarts count)" "failed 3 0"
    has_log count "refused user 'server': is the password right?" -p err || fail "no error in the journal"
    rm /etc/rpc-server/count.password
    ! systemctl start rpc-server@count || fail "started without a password"
    equal "$(show ActiveState count) $(show ExecMainStatus count) $(show NRestarts count)" "failed 243 0"
    echo RPC_SERVER_WORKERS=many >>/etc/rpc-server/fib.v2.env
    ! systemctl restart rpc-server@fib.v2 || fail "started with a wrong option"
    equal "$(show ActiveState fib.v2) $(show ExecMainStatus fib.v2) $(show NRestarts fib.v2)" "failed 2 0"
    passed "a wrong password, no password and a wrong option end a server, without restarts"

    # A server that runs and is enabled: an upgrade leaves it alone, the removal does not.
    install -m 600 /dev/null /etc/rpc-server/count.password
    echo secret >/etc/rpc-server/count.password
    systemctl reset-failed rpc-server@count # it was started often
    systemctl start rpc-server@count || fail "a server with its password again is not started"
    local pid wanted=/etc/systemd/system/multi-user.target.wants/rpc-server@count.service
    pid=$(show MainPID count)
    dpkg -i rabbitmq-rpc_*.deb
    equal "$(show MainPID count)" "$pid"
    [ -L "$wanted" ] || fail "an upgrade disables the server"
    dpkg -L rabbitmq-rpc | grep rpc- >files
    dpkg -r rabbitmq-rpc
    equal "$(show ActiveState count)" inactive
    [ ! -e "/proc/$pid" ] || fail "the server runs on"
    [ ! -L "$wanted" ] || fail "the server is still enabled"
    passed "an upgrade leaves a server running, and the removal of the package stops and disables it"

    while read -r file; do [ ! -e "$file" ] || fail "$file is left"; done <files
    passed "nothing is left after the removal of the package"
}

case $1 in
    inside) inside ;;
    *) outside "$1" ;;
esac
