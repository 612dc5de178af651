#!/bin/bash
# Runs all integration tests, with the peers in other languages, on each broker that `tests/setup.sh brokers` installs.
# Ends with a summary per broker: how many tests passed, and which ones do not apply.
set -uo pipefail

here=$(cd "$(dirname "$0")" && pwd)
brokers=$(cd "${CARGO_TARGET_DIR:-$here/../target}/brokers" && pwd)
summary= failed=

# Tests on RabbitMQ of Debian release $1, with $2 in rabbitmq.conf. $3 describes that configuration.
test_on() {
    local root=$brokers/$1 version log counts
    log=$(mktemp)
    version=$(basename "$root"/usr/lib/rabbitmq/lib/rabbitmq_server-* | sed 's/.*-//')
    echo "== RabbitMQ $version$3"
    NODE_ROOT=$root NODE_CONFIG=$2 cargo test --locked -p rpc-tests 2>&1 | tee "$log" || failed=1
    counts=$(sed -n 's/^test result: .*\. \([0-9]* passed; [0-9]* failed\).*/\1/p' "$log" | head -n 1)
    summary+="RabbitMQ $version$3: ${counts:-did not run}"$'\n'
    summary+=$(sed -n 's/.*\(does not apply to RabbitMQ .*\)/  \1/p' "$log" | sort)$'\n'
    rm -f "$log"
}

unset AMQP_URL # the tests start their own nodes
test_on trixie "" ""
test_on sid "" ""
test_on sid "deprecated_features.permit.transient_nonexcl_queues = false" ", transient queues not permitted"
echo
printf '%s' "$summary" | sed '/^$/d'
[ -z "$failed" ]
