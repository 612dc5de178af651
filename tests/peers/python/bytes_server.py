"""A server of bytes, on pika: the reply is the request in reverse order."""
import os

import pika

QUEUE = os.environ.get("RPC_QUEUE", "rpc_queue")


def on_request(channel, method, properties, body):
    channel.basic_publish(
        exchange="",
        routing_key=properties.reply_to,
        properties=pika.BasicProperties(correlation_id=properties.correlation_id),
        body=body[::-1],
    )
    channel.basic_ack(delivery_tag=method.delivery_tag)


connection = pika.BlockingConnection(pika.URLParameters(os.environ.get("AMQP_URL", "amqp://localhost")))
channel = connection.channel()
channel.queue_declare(queue=QUEUE, passive=True)
channel.basic_consume(queue=QUEUE, on_message_callback=on_request)
print(" [x] Awaiting RPC requests", flush=True)
channel.start_consuming()
