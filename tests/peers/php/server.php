<?php
// The RPC tutorial's server, on php-amqplib.
//
// RPC_QUEUE names the queue; RPC_QUEUE_TYPE=quorum declares it like the current tutorials. RPC_PREFETCH is
// the prefetch count, 1 as in the tutorial; RPC_QUIET=1 prints no line per request.

require_once __DIR__ . '/connect.php';

use PhpAmqpLib\Message\AMQPMessage;
use PhpAmqpLib\Wire\AMQPTable;

define('QUIET', getenv('RPC_QUIET') === '1');

function fib(int $n): int
{
    [$a, $b] = [0, 1];
    for ($i = 0; $i < $n; $i++) {
        [$a, $b] = [$b, $a + $b];
    }
    return $a;
}

function answer(string $body): string
{
    // The tutorial's intval($body) is 0 if the body is not a number. Above 92 the sum overflows 64 bits,
    // and PHP continues with floating point.
    if (!ctype_digit($body) || $body > 92) {
        return 'not a natural number up to 92';
    }
    if (!QUIET) {
        echo " [.] fib($body)\n";
    }
    return (string) fib((int) $body);
}

$connection = connect();
$channel = $connection->channel();
if (getenv('RPC_QUEUE_TYPE') === 'quorum') {
    $type = new AMQPTable(['x-queue-type' => 'quorum']);
    $channel->queue_declare(queue(), false, true, false, false, false, $type);
} else {
    $channel->queue_declare(queue(), false, false, false, false);
}
$channel->basic_qos(0, (int) (getenv('RPC_PREFETCH') ?: 1), false);
$channel->basic_consume(queue(), '', false, false, false, false, function (AMQPMessage $request) {
    $id = $request->has('correlation_id') ? ['correlation_id' => $request->get('correlation_id')] : [];
    $reply = new AMQPMessage(answer($request->getBody()), $id);
    $request->getChannel()->basic_publish($reply, '', $request->get('reply_to'));
    $request->ack();
});
echo " [x] Awaiting RPC requests\n";
while ($channel->is_consuming()) {
    $channel->wait();
}
