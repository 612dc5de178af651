#!/usr/bin/env python3
"""A persistent program for rpc-server: counts the words of a text.

    rpc-server --queue words --persistent -- python3 persistent.py
    rpc-client --queue words --data 'to be or not to be'

Write your own handle(); what print() writes there goes to the server's log.
"""
import base64
import json
import sys
import time
import traceback


class Error(Exception):
    """An error that the caller gets: Error(code, message)."""


def handle(data, request):
    """The function: bytes to a str, bytes, or anything that is JSON."""
    if time.time() * 1000 > request.get("deadline_ms", float("inf")):
        raise Error("expired", "the caller no longer waits")
    try:
        words = data.decode().split()
    except UnicodeDecodeError:
        raise Error("invalid-argument", "not text") from None
    return {"words": len(words)}


def reply_to(request):
    data = request.get("data_base64")
    data = request["data"].encode() if data is None else base64.b64decode(data)
    try:
        result = handle(data, request)
    except Error as error:
        code, message = error.args
        return {"error": {"code": code, "message": message}}
    except Exception:
        traceback.print_exc()
        return {"error": {"code": "internal", "message": "see the server's log"}}
    if isinstance(result, bytes):
        return {"result_base64": base64.b64encode(result).decode()}
    return {"result": result}


def main():
    # Load models and open connections here: once, before the first request.
    replies, sys.stdout = sys.stdout, sys.stderr
    print('{"ready":true}', file=replies, flush=True)
    for line in sys.stdin.buffer:
        request = json.loads(line)
        reply = {"id": request["id"], **reply_to(request)}
        print(json.dumps(reply), file=replies, flush=True)


main()
