"""A persistent program: the text in upper case."""
import json
import sys

print('{"ready":true}', flush=True)
for line in sys.stdin:
    request = json.loads(line)
    print(json.dumps({"id": request["id"], "result": request["data"].upper()}), flush=True)
