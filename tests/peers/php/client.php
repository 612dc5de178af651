<?php
// The RPC tutorial's client, on php-amqplib: client.php N... prints fib(N), a line each, in order.
//
// Up to 16 calls are outstanding at once.

require_once __DIR__ . '/connect.php';

use PhpAmqpLib\Message\AMQPMessage;

const IN_FLIGHT = 16;

class FibonacciRpcClient
{
    private $channel;
    private string $replyQueue;
    private array $pending = []; // correlation id => place in the output
    private array $answers = []; // place in the output => answer

    public function __construct(private $connection)
    {
        $this->channel = $connection->channel();
        [$this->replyQueue] = $this->channel->queue_declare('', false, false, true, false);
        $this->channel->basic_consume(
            $this->replyQueue, '', false, true, false, false, [$this, 'onReply']
        );
    }

    public function onReply(AMQPMessage $reply): void
    {
        $id = $reply->get('correlation_id');
        if (isset($this->pending[$id])) {
            $this->answers[$this->pending[$id]] = $reply->getBody();
            unset($this->pending[$id]);
        }
    }

    public function call(array $numbers): array
    {
        foreach ($numbers as $place => $n) {
            $this->waitUntilPendingAtMost(IN_FLIGHT - 1);
            $id = uniqid();
            $this->pending[$id] = $place;
            $properties = ['correlation_id' => $id, 'reply_to' => $this->replyQueue];
            $this->channel->basic_publish(new AMQPMessage($n, $properties), '', queue());
        }
        $this->waitUntilPendingAtMost(0);
        ksort($this->answers);
        return $this->answers;
    }

    // The tutorial waits while (!$this->response), and so for ever when the answer is "0".
    private function waitUntilPendingAtMost(int $count): void
    {
        while (count($this->pending) > $count) {
            $this->channel->wait();
        }
    }
}

$connection = connect();
$client = new FibonacciRpcClient($connection);
echo implode("\n", $client->call(array_slice($argv, 1))), "\n";
$connection->close();
