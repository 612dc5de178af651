"""The RPC tutorial's client, on pika: client.py N... prints fib(N) for each N, one per line, in order.

Up to RPC_IN_FLIGHT calls are outstanding at once, 16 unless it is set. With RPC_REPLY_TO=direct the replies
come by RabbitMQ's direct reply-to, as in the current tutorials, otherwise to an exclusive queue. With RPC_REPEAT=K it
asks for each N K times, and prints the number of calls, the seconds they took, and the median of their
latencies in microseconds, instead of the answers.
"""
import os
import sys
import uuid
from time import perf_counter

import pika

QUEUE = os.environ.get("RPC_QUEUE", "rpc_queue")
IN_FLIGHT = int(os.environ.get("RPC_IN_FLIGHT") or 16)
REPEAT = int(os.environ.get("RPC_REPEAT") or 0)


class FibonacciRpcClient:
    def __init__(self, url):
        self.connection = pika.BlockingConnection(pika.URLParameters(url))
        self.channel = self.connection.channel()
        if os.environ.get("RPC_REPLY_TO") == "direct":
            self.reply_to = "amq.rabbitmq.reply-to"
        else:
            self.reply_to = self.channel.queue_declare(queue="", exclusive=True).method.queue
        self.channel.basic_consume(queue=self.reply_to, on_message_callback=self.on_reply, auto_ack=True)
        self.pending = {}  # correlation id -> place in the output, start time
        self.answers = {}  # place in the output -> answer
        self.latencies = []
        self.seconds = 0.0

    def on_reply(self, channel, method, properties, body):
        call = self.pending.pop(properties.correlation_id, None)
        if call is None:
            print("discarded an unexpected reply", file=sys.stderr)
        else:
            place, began = call
            self.latencies.append(perf_counter() - began)
            self.answers[place] = body.decode()

    def call(self, numbers):
        began = perf_counter()
        for place, n in enumerate(numbers):
            self.wait_until_pending_at_most(IN_FLIGHT - 1)
            correlation_id = str(uuid.uuid4())
            self.pending[correlation_id] = place, perf_counter()
            self.channel.basic_publish(
                exchange="",
                routing_key=QUEUE,
                properties=pika.BasicProperties(reply_to=self.reply_to, correlation_id=correlation_id),
                body=n,
            )
        self.wait_until_pending_at_most(0)
        self.seconds = perf_counter() - began
        return [self.answers[place] for place in range(len(numbers))]

    def wait_until_pending_at_most(self, count):
        # In a loop: some published variants wait once, and use the first reply as the answer.
        while len(self.pending) > count:
            self.connection.process_data_events(time_limit=None)


client = FibonacciRpcClient(os.environ.get("AMQP_URL", "amqp://localhost"))
if REPEAT:
    count = len(client.call(sys.argv[1:] * REPEAT))
    print(f"{count} {client.seconds:.6f} {sorted(client.latencies)[count // 2] * 1e6:.1f}")
else:
    print("\n".join(client.call(sys.argv[1:])))
client.connection.close()
