// The RPC tutorial's client, on amqplib: client.js N... prints fib(N), a line each, in order.
//
// Up to 16 calls are outstanding at once.
const amqp = require('amqplib');

const queue = process.env.RPC_QUEUE || 'rpc_queue';
const inFlight = 16;

// As the tutorial's generateUuid.
const randomId = () => [1, 2, 3].map(() => Math.random().toString()).join('');

async function main(numbers) {
  // Without noDelay every call takes 44 ms.
  const connection = await amqp.connect(process.env.AMQP_URL || 'amqp://localhost', { noDelay: true });
  const channel = await connection.createChannel();
  const { queue: replyTo } = await channel.assertQueue('', { exclusive: true });
  const pending = new Map(); // correlation id -> the one who waits for the answer
  await channel.consume(replyTo, (reply) => {
    const resolve = pending.get(reply.properties.correlationId);
    if (!resolve) return;
    pending.delete(reply.properties.correlationId);
    resolve(reply.content.toString());
  }, { noAck: true });

  const call = (n) => new Promise((resolve) => {
    const correlationId = randomId();
    pending.set(correlationId, resolve);
    channel.sendToQueue(queue, Buffer.from(n), { correlationId, replyTo });
  });

  const answers = [];
  const asking = numbers.entries();
  const ask = async () => {
    for (const [place, n] of asking) answers[place] = await call(n);
  };
  await Promise.all(Array.from({ length: inFlight }, ask));
  console.log(answers.join('\n'));
  await connection.close();
}

main(process.argv.slice(2));
