// The RPC tutorial's client, on amqplib: client.js N... prints fib(N) for each N, one per line, in order.
//
// Up to RPC_IN_FLIGHT calls are outstanding at once, 16 unless it is set. With RPC_REPEAT=K it asks for
// each N K times, and prints the number of calls, the seconds they took, and the median of their
// latencies in microseconds, instead of the answers.
const amqp = require('amqplib');

const queue = process.env.RPC_QUEUE || 'rpc_queue';
const inFlight = Number(process.env.RPC_IN_FLIGHT || 16);
const repeat = Number(process.env.RPC_REPEAT || 1);

// Like generateUuid of the tutorial.
const randomId = () => [1, 2, 3].map(() => Math.random().toString()).join('');

async function main(numbers) {
  // Without noDelay every call takes 44 ms.
  const connection = await amqp.connect(process.env.AMQP_URL || 'amqp://localhost', { noDelay: true });
  const channel = await connection.createChannel();
  const { queue: replyTo } = await channel.assertQueue('', { exclusive: true });
  const pending = new Map(); // correlation id -> resolve function and start time of the call
  const latencies = [];
  await channel.consume(replyTo, (reply) => {
    const call = pending.get(reply.properties.correlationId);
    if (!call) return;
    latencies.push(performance.now() - call.began);
    pending.delete(reply.properties.correlationId);
    call.resolve(reply.content.toString());
  }, { noAck: true });

  const call = (n) => new Promise((resolve) => {
    const correlationId = randomId();
    pending.set(correlationId, { resolve, began: performance.now() });
    channel.sendToQueue(queue, Buffer.from(n), { correlationId, replyTo });
  });

  const answers = [];
  const count = numbers.length * repeat;
  let next = 0;
  const ask = async () => {
    while (next < count) {
      const place = next++;
      answers[place] = await call(numbers[place % numbers.length]);
    }
  };
  const began = performance.now();
  await Promise.all(Array.from({ length: inFlight }, ask));
  const seconds = (performance.now() - began) / 1e3;
  if (process.env.RPC_REPEAT) {
    const median = Float64Array.from(latencies).sort()[count >> 1] * 1e3;
    console.log(`${count} ${seconds.toFixed(6)} ${median.toFixed(1)}`);
  } else {
    console.log(answers.join('\n'));
  }
  await connection.close();
}

main(process.argv.slice(2));
