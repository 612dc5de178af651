// The RPC tutorial's server, on amqplib.
//
// RPC_QUEUE names the queue; RPC_QUEUE_TYPE=quorum declares it like the current tutorials. RPC_PREFETCH is
// the prefetch count, 1 as in the tutorial; RPC_QUIET=1 prints no line per request.
const amqp = require('amqplib');

const queue = process.env.RPC_QUEUE || 'rpc_queue';
const options = process.env.RPC_QUEUE_TYPE === 'quorum'
  ? { durable: true, arguments: { 'x-queue-type': 'quorum' } }
  : { durable: false };
const prefetch = Number(process.env.RPC_PREFETCH || 1);
const quiet = process.env.RPC_QUIET === '1';

// The tutorial uses Number, which is exact up to fib(78) only.
function fib(n) {
  let [a, b] = [0n, 1n];
  for (let i = 0; i < n; i++) [a, b] = [b, a + b];
  return a;
}

// The tutorial's parseInt turns other text into NaN, and the server answers NaN.
function answer(body) {
  if (!/^[0-9]{1,6}$/.test(body)) return 'not a natural number below a million';
  if (!quiet) console.log(` [.] fib(${body})`);
  return fib(Number(body)).toString();
}

async function serve() {
  // Without noDelay every call takes 44 ms.
  const connection = await amqp.connect(process.env.AMQP_URL || 'amqp://localhost', { noDelay: true });
  const channel = await connection.createChannel();
  await channel.assertQueue(queue, options);
  await channel.prefetch(prefetch);
  await channel.consume(queue, (request) => {
    const { replyTo, correlationId } = request.properties;
    channel.sendToQueue(replyTo, Buffer.from(answer(request.content.toString())), { correlationId });
    channel.ack(request);
  });
  console.log(' [x] Awaiting RPC requests');
}

serve();
