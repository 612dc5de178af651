# The RPC tutorial's server, on AnyEvent::RabbitMQ.
#
# RPC_QUEUE names the queue; RPC_QUEUE_TYPE=quorum declares it like the current tutorials.
use strict;
use warnings;
use FindBin;
use lib $FindBin::Bin;
use connect;

$| = 1;
my $queue = $ENV{RPC_QUEUE} || 'rpc_queue';
my @options = ($ENV{RPC_QUEUE_TYPE} || '') eq 'quorum'
    ? (durable => 1, arguments => { 'x-queue-type' => 'quorum' }) : ();

sub answer {
    my ($body) = @_;
    return 'not a natural number below a million' unless $body =~ /^[0-9]{1,6}$/;
    print " [.] fib($body)\n";
    use integer; # 64 bits
    my ($a, $b) = (0, 1);
    ($a, $b) = ($b, $a + $b) for 1 .. $body;
    return "$a";
}

my $connection = connect::open_channel(sub {
    my ($channel) = @_;
    $channel->declare_queue(queue => $queue, @options, on_success => sub {
        $channel->qos(prefetch_count => 1);
        $channel->consume(
            queue => $queue,
            no_ack => 0,
            on_success => sub { print " [x] Awaiting RPC requests\n" },
            on_consume => sub {
                my ($message) = @_;
                my $header = $message->{header};
                $channel->publish(
                    exchange => '',
                    routing_key => $header->reply_to,
                    body => answer($message->{body}->payload),
                    header => { correlation_id => $header->correlation_id },
                );
                $channel->ack(delivery_tag => $message->{deliver}->method_frame->delivery_tag);
            },
        );
    }, on_failure => sub { print STDERR "the queue cannot be declared\n"; exit 1 });
});
AnyEvent->condvar->recv;
