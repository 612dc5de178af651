#!/bin/bash
# Runs all integration tests, with the peers in other languages, on each broker that `tests/setup.sh brokers` has
# installed, and ends with a summary: how many passed on which, and what does not apply to it.
set -uo pipefail

here=$(cd "$(dirname "$0")" && pwd)
brokers=$(cd "${CARGO_TARGET_DIR:-$here/../target}/brokers" && pwd)
summary= failed=

# Tests on the RabbitMQ of Debian's release $1, with $2 in its configuration, which $3 names.
test_on() {
    local root=$brokers/$1 version log counts
    log=$(mktemp)
    version=$(basename "$root"/usr/lib/rabbitmq/lib/rabbitmq_server-* | sed 's/.*-//')
    echo "== RabbitMQ $version$3"
    NODE_ROOT=$root NODE_CONFIG=$2 cargo test --locked -p rpc-tests 2>&1 | tee "$log" || failed=1
    counts=$(sed -n 's/^test result: .*\. \([0-9]* passed; [0-9]* failed\).*/\1/p' "$log" | head -n 1)
    summary+="RabbitMQ $version$3: ${counts:-it did not run}"$'\n'
    summary+=$(sed -n 's/.*\(does not apply to RabbitMQ .*\)/  \1/p' "$log" | sort)$'\n'
    rm -f "$log"
}

unset AMQP_URL # the nodes that the tests start
test_on trixie "" ""
test_on sid "" ""
test_on sid "deprecated_features.permit.transient_nonexcl_queues = false" ", transient queues not permitted"
echo
printf '%s' "$summary" | sed '/^$/d'
[ -z "$failed" ]
