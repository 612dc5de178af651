// Calls with any bytes, on amqplib: sends standard input as the request, and writes the reply to standard output.
const amqp = require('amqplib');
const fs = require('fs');

async function main() {
  const connection = await amqp.connect(process.env.AMQP_URL || 'amqp://localhost', { noDelay: true });
  const channel = await connection.createChannel();
  const { queue: replyTo } = await channel.assertQueue('', { exclusive: true });
  const reply = new Promise((resolve) => channel.consume(replyTo, resolve, { noAck: true }));
  channel.sendToQueue(process.env.RPC_QUEUE || 'rpc_queue', fs.readFileSync(0), { correlationId: '1', replyTo });
  process.stdout.write((await reply).content);
  await connection.close();
}

main().catch((error) => {
  console.error(`bytes_client.js: ${error.message}`);
  process.exit(1);
});
