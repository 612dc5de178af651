// Shared by the RPC tutorial's server and client on librabbitmq.
#include <amqp.h>
#include <amqp_tcp_socket.h>
#include <inttypes.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CHANNEL 1

static inline _Noreturn void die(const char *doing, const char *why)
{
    fprintf(stderr, "%s: %s\n", doing, why);
    exit(1);
}

static inline void check(int status, const char *doing)
{
    if (status != AMQP_STATUS_OK)
        die(doing, amqp_error_string2(status));
}

static inline void check_reply(amqp_rpc_reply_t reply, const char *doing)
{
    if (reply.reply_type == AMQP_RESPONSE_SERVER_EXCEPTION) {
        amqp_bytes_t why = reply.reply.id == AMQP_CHANNEL_CLOSE_METHOD
            ? ((amqp_channel_close_t *)reply.reply.decoded)->reply_text
            : ((amqp_connection_close_t *)reply.reply.decoded)->reply_text;
        fprintf(stderr, "%s: %.*s\n", doing, (int)why.len, (char *)why.bytes);
        exit(1);
    }
    if (reply.reply_type != AMQP_RESPONSE_NORMAL)
        die(doing, amqp_error_string2(reply.library_error));
}

static inline const char *env(const char *name, const char *otherwise)
{
    const char *value = getenv(name);
    return value && *value ? value : otherwise;
}

// Whether the text, which has no terminating zero, is a whole number up to max. max * 10 + 9 must fit in 64 bits.
static inline bool parse(amqp_bytes_t text, uint64_t max, uint64_t *number)
{
    const unsigned char *digits = text.bytes;
    *number = 0;
    for (size_t i = 0; i < text.len; i++) {
        unsigned digit = digits[i] - '0';
        *number = *number * 10 + digit;
        if (digit > 9 || *number > max)
            return false;
    }
    return text.len > 0;
}

static inline uint64_t env_number(const char *name, const char *otherwise, uint64_t max)
{
    uint64_t number;
    if (!parse(amqp_cstring_bytes(env(name, otherwise)), max, &number) || number == 0)
        die(name, "not a number in range");
    return number;
}

// Opens a connection to AMQP_URL, with a channel.
static inline amqp_connection_state_t connect_to_broker(void)
{
    char *url = strdup(env("AMQP_URL", "amqp://localhost")); // the parts point into it
    struct amqp_connection_info broker;
    check(amqp_parse_url(url, &broker), "AMQP_URL");
    const char *vhost = *broker.vhost ? broker.vhost : "/";

    amqp_connection_state_t connection = amqp_new_connection();
    check(amqp_socket_open(amqp_tcp_socket_new(connection), broker.host, broker.port), "connect");
    check_reply(amqp_login(connection, vhost, AMQP_DEFAULT_MAX_CHANNELS, AMQP_DEFAULT_FRAME_SIZE, 0,
                    AMQP_SASL_METHOD_PLAIN, broker.user, broker.password), "log in");
    amqp_channel_open(connection, CHANNEL);
    check_reply(amqp_get_rpc_reply(connection), "open a channel");
    free(url);
    return connection;
}
