<?php
// The RPC tutorial's client, on php-amqplib: client.php N... prints fib(N) for each N, one per line, in order.
//
// Up to RPC_IN_FLIGHT calls are outstanding at once, 16 unless it is set. With RPC_REPEAT=K it asks for
// each N K times, and prints the number of calls, the seconds they took, and the median of their
// latencies in microseconds, instead of the answers.

require_once __DIR__ . '/connect.php';

use PhpAmqpLib\Message\AMQPMessage;

define('IN_FLIGHT', (int) (getenv('RPC_IN_FLIGHT') ?: 16));

class FibonacciRpcClient
{
    private $channel;
    private string $replyQueue;
    private array $pending = []; // correlation id => place in the output
    private array $answers = []; // place in the output => answer
    private array $began = []; // place in the output => nanoseconds
    public array $latencies = []; // nanoseconds, in any order
    public int $took = 0; // nanoseconds

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
            $place = $this->pending[$id];
            $this->latencies[] = hrtime(true) - $this->began[$place];
            $this->answers[$place] = $reply->getBody();
            unset($this->pending[$id]);
        }
    }

    public function call(array $numbers): array
    {
        $began = hrtime(true);
        foreach ($numbers as $place => $n) {
            $this->waitUntilPendingAtMost(IN_FLIGHT - 1);
            $id = uniqid();
            $this->pending[$id] = $place;
            $properties = ['correlation_id' => $id, 'reply_to' => $this->replyQueue];
            $this->began[$place] = hrtime(true);
            $this->channel->basic_publish(new AMQPMessage($n, $properties), '', queue());
        }
        $this->waitUntilPendingAtMost(0);
        $this->took = hrtime(true) - $began;
        ksort($this->answers);
        return $this->answers;
    }

    // The tutorial waits while (!$this->response), so for ever if the answer is "0".
    private function waitUntilPendingAtMost(int $count): void
    {
        while (count($this->pending) > $count) {
            $this->channel->wait();
        }
    }
}

$connection = connect();
$client = new FibonacciRpcClient($connection);
$numbers = array_slice($argv, 1);
if ($repeat = (int) getenv('RPC_REPEAT')) {
    $count = count($client->call(array_merge(...array_fill(0, $repeat, $numbers))));
    sort($client->latencies);
    printf("%d %.6f %.1f\n", $count, $client->took / 1e9, $client->latencies[intdiv($count, 2)] / 1e3);
} else {
    echo implode("\n", $client->call($numbers)), "\n";
}
$connection->close();
