// The RPC tutorial's client, on librabbitmq: c-client N... prints fib(N) for each N, one per line, in order.
//
// Up to RPC_IN_FLIGHT calls are outstanding at once, 16 unless it is set. With RPC_REPEAT=K it asks for
// each N K times, and prints the number of calls, the seconds they took, and the median of their
// latencies in microseconds, instead of the answers. With RPC_CLIENT_PROPERTIES=1 a request is
// mandatory, persistent, expires, has a header and is confirmed, like those of rpc-client.
#include "rpc.h"
#include <time.h>

struct call {
    double began;
    double seconds;
    char *answer;
    bool is_pending;
};

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec / 1e9;
}

static int by_seconds(const void *left, const void *right)
{
    double a = ((const struct call *)left)->seconds, b = ((const struct call *)right)->seconds;
    return (a > b) - (a < b);
}

// Waits for the reply to a pending call, and discards other replies.
static void take_reply(amqp_connection_state_t connection, struct call *calls, size_t count)
{
    for (;;) {
        amqp_maybe_release_buffers(connection); // otherwise they grow with every frame
        amqp_envelope_t reply;
        amqp_rpc_reply_t result = amqp_consume_message(connection, &reply, NULL, 0);
        if (result.reply_type == AMQP_RESPONSE_LIBRARY_EXCEPTION
            && result.library_error == AMQP_STATUS_UNEXPECTED_STATE) {
            amqp_frame_t confirmation; // it comes before the reply, or after
            check(amqp_simple_wait_frame(connection, &confirmation), "take a confirmation");
            continue;
        }
        check_reply(result, "wait for a reply");
        uint64_t place;
        bool known = parse(reply.message.properties.correlation_id, count - 1, &place)
            && calls[place].is_pending;
        if (known) {
            calls[place].is_pending = false;
            calls[place].seconds = now() - calls[place].began;
            amqp_bytes_t body = reply.message.body;
            calls[place].answer = strndup(body.len ? body.bytes : "", body.len);
        }
        amqp_destroy_envelope(&reply);
        if (known)
            return;
    }
}

int main(int argc, char **argv)
{
    if (argc < 2)
        die("usage", "c-client N...");
    amqp_bytes_t server = amqp_cstring_bytes(env("RPC_QUEUE", "rpc_queue"));
    size_t in_flight = env_number("RPC_IN_FLIGHT", "16", UINT32_MAX);
    bool client_properties = strcmp(env("RPC_CLIENT_PROPERTIES", ""), "1") == 0;
    bool measure = *env("RPC_REPEAT", "");
    size_t numbers = argc - 1;
    size_t count = numbers * env_number("RPC_REPEAT", "1", UINT32_MAX);
    struct call *calls = calloc(count, sizeof *calls);
    if (!calls)
        die("the calls", "out of memory");

    amqp_connection_state_t connection = connect_to_broker();
    amqp_queue_declare_ok_t *declared = amqp_queue_declare(
        connection, CHANNEL, amqp_empty_bytes, false, false, true, false, amqp_empty_table);
    check_reply(amqp_get_rpc_reply(connection), "declare the reply queue");
    amqp_bytes_t replies = amqp_bytes_malloc_dup(declared->queue); // the buffer of the original is released
    amqp_basic_consume(connection, CHANNEL, replies, amqp_empty_bytes, false, true, false, amqp_empty_table);
    check_reply(amqp_get_rpc_reply(connection), "consume");
    if (client_properties) {
        amqp_confirm_select(connection, CHANNEL);
        check_reply(amqp_get_rpc_reply(connection), "select confirms");
    }

    amqp_table_entry_t deadline = { .key = amqp_cstring_bytes("x-deadline-ms"), .value.kind = AMQP_FIELD_KIND_I64 };
    deadline.value.value.i64 = INT64_C(4102444800000); // 2100: the server of the tutorial does not read it

    size_t pending = 0;
    for (size_t place = 0; place < count; place++) {
        for (; pending >= in_flight; pending--)
            take_reply(connection, calls, count);
        // The place is unique enough as an id: the queue is new and exclusive.
        char id[40];
        snprintf(id, sizeof id, client_properties ? "%036zu" : "%zu", place);
        amqp_basic_properties_t properties = {
            ._flags = AMQP_BASIC_CONTENT_TYPE_FLAG | AMQP_BASIC_CORRELATION_ID_FLAG | AMQP_BASIC_REPLY_TO_FLAG,
            .content_type = amqp_cstring_bytes("text/plain"),
            .correlation_id = amqp_cstring_bytes(id),
            .reply_to = replies,
        };
        if (client_properties) {
            properties._flags |= AMQP_BASIC_DELIVERY_MODE_FLAG | AMQP_BASIC_EXPIRATION_FLAG | AMQP_BASIC_HEADERS_FLAG;
            properties.headers = (amqp_table_t) { .num_entries = 1, .entries = &deadline };
            properties.delivery_mode = AMQP_DELIVERY_PERSISTENT;
            properties.expiration = amqp_cstring_bytes("30000");
        }
        calls[place].is_pending = true;
        calls[place].began = now();
        check(amqp_basic_publish(connection, CHANNEL, amqp_empty_bytes, server, client_properties, false, &properties,
                  amqp_cstring_bytes(argv[1 + place % numbers])), "publish");
        pending++;
    }
    for (; pending > 0; pending--)
        take_reply(connection, calls, count);

    if (measure) {
        double seconds = now() - calls[0].began;
        qsort(calls, count, sizeof *calls, by_seconds);
        printf("%zu %.6f %.1f\n", count, seconds, calls[count / 2].seconds * 1e6);
    } else {
        for (size_t place = 0; place < count; place++)
            puts(calls[place].answer);
    }
    for (size_t place = 0; place < count; place++)
        free(calls[place].answer);
    free(calls);
    amqp_bytes_free(replies);
    check_reply(amqp_connection_close(connection, AMQP_REPLY_SUCCESS), "close");
    amqp_destroy_connection(connection);
}
