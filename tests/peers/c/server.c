// The RPC tutorial's server, on librabbitmq.
//
// RPC_QUEUE names the queue; RPC_QUEUE_TYPE=quorum declares it like the current tutorials. RPC_PREFETCH is
// the prefetch count, 1 as in the tutorial; RPC_QUIET=1 prints no line per request.
#include "rpc.h"

static uint64_t fib(uint64_t n)
{
    uint64_t a = 0, b = 1;
    while (n-- > 0) {
        uint64_t sum = a + b;
        a = b;
        b = sum;
    }
    return a;
}

int main(void)
{
    amqp_bytes_t queue = amqp_cstring_bytes(env("RPC_QUEUE", "rpc_queue"));
    bool quorum = strcmp(env("RPC_QUEUE_TYPE", ""), "quorum") == 0;
    bool quiet = strcmp(env("RPC_QUIET", ""), "1") == 0;
    uint16_t prefetch = env_number("RPC_PREFETCH", "1", UINT16_MAX);
    setvbuf(stdout, NULL, _IOLBF, 0); // also into a pipe

    amqp_connection_state_t connection = connect_to_broker();
    amqp_table_entry_t type = {
        .key = amqp_cstring_bytes("x-queue-type"),
        .value = {.kind = AMQP_FIELD_KIND_UTF8, .value.bytes = amqp_cstring_bytes("quorum")},
    };
    amqp_table_t arguments = {.num_entries = quorum, .entries = &type};
    amqp_queue_declare(connection, CHANNEL, queue, false, quorum, false, false, arguments);
    check_reply(amqp_get_rpc_reply(connection), "declare the queue");
    amqp_basic_qos(connection, CHANNEL, 0, prefetch, false);
    check_reply(amqp_get_rpc_reply(connection), "set the prefetch");
    amqp_basic_consume(connection, CHANNEL, queue, amqp_empty_bytes, false, false, false, amqp_empty_table);
    check_reply(amqp_get_rpc_reply(connection), "consume");
    puts(" [x] Awaiting RPC requests");

    for (;;) {
        amqp_maybe_release_buffers(connection); // otherwise they grow with every frame
        amqp_envelope_t request;
        check_reply(amqp_consume_message(connection, &request, NULL, 0), "wait for a request");

        // The tutorial's server ends if a body is not a number. fib(93) is the largest that fits in 64 bits.
        char answer[32] = "not a natural number up to 93";
        uint64_t n;
        if (parse(request.message.body, 93, &n)) {
            if (!quiet)
                printf(" [.] fib(%" PRIu64 ")\n", n);
            snprintf(answer, sizeof answer, "%" PRIu64, fib(n));
        }

        amqp_basic_properties_t *asked = &request.message.properties;
        amqp_basic_properties_t properties = {
            ._flags = AMQP_BASIC_CONTENT_TYPE_FLAG | (asked->_flags & AMQP_BASIC_CORRELATION_ID_FLAG),
            .content_type = amqp_cstring_bytes("text/plain"),
            .correlation_id = asked->correlation_id,
        };
        check(amqp_basic_publish(connection, CHANNEL, amqp_empty_bytes, asked->reply_to, false, false,
                  &properties, amqp_cstring_bytes(answer)), "reply");
        check(amqp_basic_ack(connection, CHANNEL, request.delivery_tag, false), "acknowledge");
        amqp_destroy_envelope(&request);
    }
}
