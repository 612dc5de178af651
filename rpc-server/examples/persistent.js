#!/usr/bin/env node
// A persistent program for rpc-server: counts the words of a text.
//
//     rpc-server --queue words --persistent -- node persistent.js
//     rpc-client --queue words --data 'to be or not to be'
//
// Write your own handle(); what console.error() writes goes to the server's log.
const { createInterface } = require('node:readline')

// An error that the caller gets.
class CallError extends Error {
  constructor (code, message) {
    super(message)
    this.code = code
  }
}

// The function: a Buffer to a string, a Buffer, or anything that is JSON. It may be async.
function handle (data, request) {
  if (Date.now() > (request.deadline_ms ?? Infinity)) {
    throw new CallError('expired', 'the caller no longer waits')
  }
  if (request.data === undefined) {
    throw new CallError('invalid-argument', 'not text')
  }
  return { words: data.toString().split(/\s+/).filter(Boolean).length }
}

async function replyTo (request) {
  const data = request.data === undefined
    ? Buffer.from(request.data_base64, 'base64')
    : Buffer.from(request.data)
  try {
    const result = await handle(data, request)
    return Buffer.isBuffer(result) ? { result_base64: result.toString('base64') } : { result }
  } catch (error) {
    if (error instanceof CallError) return { error: { code: error.code, message: error.message } }
    console.error(error)
    return { error: { code: 'internal', message: "see the server's log" } }
  }
}

async function main () {
  // Load models and open connections here: once, before the first request.
  console.log = console.error
  process.stdout.write('{"ready":true}\n')
  for await (const line of createInterface({ input: process.stdin })) {
    const request = JSON.parse(line)
    const reply = { id: request.id, ...await replyTo(request) }
    process.stdout.write(JSON.stringify(reply) + '\n')
  }
}

main()
