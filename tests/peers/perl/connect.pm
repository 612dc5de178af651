# Connects to AMQP_URL, and calls back with a channel.
package connect;
use strict;
use warnings;
use AnyEvent::RabbitMQ;

my $fail = sub { print STDERR "the broker failed: ", (ref $_[0] ? ref $_[0] : $_[0]), "\n"; exit 1 };

sub open_channel {
    my ($on_channel) = @_;
    my $url = $ENV{AMQP_URL} || 'amqp://localhost';
    my ($user, $password, $host, $port, $vhost) =
        $url =~ m{^amqp://(?:([^:@/]+):([^@/]+)@)?([^:/]+)(?::(\d+))?(?:/(.*))?$} or die "bad URL\n";
    my $rabbit = AnyEvent::RabbitMQ->new->load_xml_spec;
    $rabbit->connect(
        host => $host, port => $port || 5672, user => $user || 'guest', pass => $password || 'guest',
        vhost => $vhost || '/', timeout => 10,
        on_success => sub {
            $rabbit->open_channel(on_success => $on_channel, on_failure => $fail, on_close => $fail);
        },
        on_failure => $fail, on_read_failure => $fail, on_close => $fail,
    );
    return $rabbit; # to be kept
}

1;
