<?php
// Debian's php-amqplib, and the connection that AMQP_URL names.

require_once 'PhpAmqpLib/autoload.php';

use PhpAmqpLib\Connection\AMQPStreamConnection;

function connect(): AMQPStreamConnection
{
    $url = parse_url(getenv('AMQP_URL') ?: 'amqp://localhost');
    return new AMQPStreamConnection(
        $url['host'],
        $url['port'] ?? 5672,
        urldecode($url['user'] ?? 'guest'),
        urldecode($url['pass'] ?? 'guest'),
        urldecode(substr($url['path'] ?? '/', 1)) ?: '/'
    );
}

function queue(): string
{
    return getenv('RPC_QUEUE') ?: 'rpc_queue';
}
