// The same function as a server, on amqplib. RPC_QUEUE exists; RPC_PREFETCH is the prefetch count.
const amqp = require('amqplib')

async function serve () {
  const connection = await amqp.connect(process.env.AMQP_URL, { noDelay: true })
  const channel = await connection.createChannel()
  await channel.prefetch(Number(process.env.RPC_PREFETCH))
  await channel.consume(process.env.RPC_QUEUE, (request) => {
    const { replyTo, correlationId } = request.properties
    const body = Buffer.from(request.content.toString().toUpperCase())
    channel.sendToQueue(replyTo, body, { correlationId })
    channel.ack(request)
  })
}

serve()
