"""A client of AMQP 1.0, on Qpid Proton: client.py BODY... prints each answer.

RPC_QUEUE is the request queue, RPC_REPLY_QUEUE an existing queue for the replies. A body is sent as a data section;
with RPC_SECTION=value as a value, which servers of AMQP 0-9-1 get encoded.
"""
import os
import sys
import uuid

from proton import Message
from proton.utils import BlockingConnection

connection = BlockingConnection(os.environ["AMQP_URL"], allow_insecure_mechs=True)
reply_to = "/queues/" + os.environ["RPC_REPLY_QUEUE"]
receiver = connection.create_receiver(reply_to)
sender = connection.create_sender("/queues/" + os.environ["RPC_QUEUE"])
for body in sys.argv[1:]:
    # Neither a correlation id: the message id is the call's, as AMQP 1.0 has it.
    if os.environ.get("RPC_SECTION") == "value":
        request = Message(id=str(uuid.uuid4()), reply_to=reply_to, body=body)
    else:
        request = Message(id=str(uuid.uuid4()), reply_to=reply_to, body=body.encode(), inferred=True)
    sender.send(request)
    reply = receiver.receive(timeout=60)
    receiver.accept()
    assert reply.correlation_id == request.id, reply
    print(bytes(reply.body).decode())
connection.close()
