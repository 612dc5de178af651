"""The same function as a server, on pika. RPC_QUEUE exists; RPC_PREFETCH is the prefetch count."""
import os

import pika


def on_request(channel, method, properties, body):
    channel.basic_publish(
        exchange="",
        routing_key=properties.reply_to,
        properties=pika.BasicProperties(correlation_id=properties.correlation_id),
        body=body.decode().upper(),
    )
    channel.basic_ack(delivery_tag=method.delivery_tag)


connection = pika.BlockingConnection(pika.URLParameters(os.environ["AMQP_URL"]))
channel = connection.channel()
channel.basic_qos(prefetch_count=int(os.environ["RPC_PREFETCH"]))
channel.basic_consume(queue=os.environ["RPC_QUEUE"], on_message_callback=on_request)
channel.start_consuming()
