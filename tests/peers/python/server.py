"""The RPC tutorial's server, on pika.

RPC_QUEUE names the queue; RPC_QUEUE_TYPE=quorum declares it like the current tutorials. RPC_PREFETCH is
the prefetch count, 1 as in the tutorial; RPC_QUIET=1 prints no line per request.
"""
import os

import pika

QUEUE = os.environ.get("RPC_QUEUE", "rpc_queue")
PREFETCH = int(os.environ.get("RPC_PREFETCH") or 1)
QUIET = os.environ.get("RPC_QUIET") == "1"


def fib(n):
    a, b = 0, 1
    for _ in range(n):
        a, b = b, a + b
    return a


def answer(body):
    # The tutorial's int(body) raises an exception, which ends the server.
    if not body.isdigit() or len(body) > 6:
        return "not a natural number below a million"
    n = int(body)
    if not QUIET:
        print(f" [.] fib({n})", flush=True)
    return str(fib(n))


def on_request(channel, method, properties, body):
    channel.basic_publish(
        exchange="",
        routing_key=properties.reply_to,
        properties=pika.BasicProperties(correlation_id=properties.correlation_id),
        body=answer(body),
    )
    channel.basic_ack(delivery_tag=method.delivery_tag)


connection = pika.BlockingConnection(pika.URLParameters(os.environ.get("AMQP_URL", "amqp://localhost")))
channel = connection.channel()
if os.environ.get("RPC_QUEUE_TYPE") == "quorum":
    channel.queue_declare(queue=QUEUE, durable=True, arguments={"x-queue-type": "quorum"})
else:
    channel.queue_declare(queue=QUEUE)
channel.basic_qos(prefetch_count=PREFETCH)
channel.basic_consume(queue=QUEUE, on_message_callback=on_request)
print(" [x] Awaiting RPC requests", flush=True)
channel.start_consuming()
