"""A server of AMQP 1.0, on Qpid Proton: answers with the body in upper case.

RPC_QUEUE is the request queue, which exists. A body is sent as a data section; with RPC_SECTION=value as a value, which
clients of AMQP 0-9-1 get encoded.
"""
import os

from proton import Message
from proton.utils import BlockingConnection

connection = BlockingConnection(os.environ["AMQP_URL"], allow_insecure_mechs=True)
receiver = connection.create_receiver("/queues/" + os.environ["RPC_QUEUE"], credit=1)
print(" [x] Awaiting RPC requests", flush=True)
while True:
    request = receiver.receive(timeout=None)
    sender = connection.create_sender(request.reply_to)
    # The message id is the call's, as AMQP 1.0 has it.
    body = bytes(request.body).upper()
    if os.environ.get("RPC_SECTION") == "value":
        sender.send(Message(correlation_id=request.id, body=body.decode()))
    else:
        sender.send(Message(correlation_id=request.id, body=body, inferred=True))
    sender.close()
    receiver.accept()
