# The RPC tutorial's client, on AnyEvent::RabbitMQ: client.pl N... prints fib(N) for each N, one per line, in order.
use strict;
use warnings;
use FindBin;
use lib $FindBin::Bin;
use connect;

my $queue = $ENV{RPC_QUEUE} || 'rpc_queue';
my @answers;
my $pending = @ARGV;
my $done = AnyEvent->condvar;

my $connection = connect::open_channel(sub {
    my ($channel) = @_;
    $channel->declare_queue(queue => '', exclusive => 1, on_success => sub {
        my $reply_to = $_[0]->method_frame->queue;
        $channel->consume(
            queue => $reply_to,
            on_success => sub {
                for my $place (0 .. $#ARGV) {
                    $channel->publish(
                        exchange => '',
                        routing_key => $queue,
                        body => $ARGV[$place],
                        header => { reply_to => $reply_to, correlation_id => "call-$place" },
                    );
                }
            },
            on_consume => sub {
                my ($message) = @_;
                my ($place) = $message->{header}->correlation_id =~ /^call-(\d+)$/ or return;
                $answers[$place] = $message->{body}->payload;
                $done->send unless --$pending;
            },
        );
    });
});
$done->recv;
print "$_\n" for @answers;
