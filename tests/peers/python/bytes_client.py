"""Calls with any bytes, on pika: sends standard input as the request, and writes the reply to standard output."""
import os
import sys
import uuid

import pika

connection = pika.BlockingConnection(pika.URLParameters(os.environ.get("AMQP_URL", "amqp://localhost")))
channel = connection.channel()
reply_to = channel.queue_declare(queue="", exclusive=True).method.queue
channel.basic_publish(
    exchange="",
    routing_key=os.environ.get("RPC_QUEUE", "rpc_queue"),
    properties=pika.BasicProperties(reply_to=reply_to, correlation_id=str(uuid.uuid4())),
    body=sys.stdin.buffer.read(),
)
for method, properties, body in channel.consume(reply_to, auto_ack=True):
    sys.stdout.buffer.write(body)
    break
connection.close()
