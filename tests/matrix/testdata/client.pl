# Connections as Perl makes them: [METHOD HOST PORT]...; there is one method. A
# host with commas is a name with these addresses. Random bytes are echoed over
# each connection; what it saw is a line of JSON.
use strict;
use warnings;
use IO::Socket::IP;
use Socket qw(getaddrinfo SOCK_STREAM AI_NUMERICHOST SHUT_WR);

$| = 1;
while (my ($method, $host, $port) = splice(@ARGV, 0, 3)) {
    my @infos;
    for my $addr (split /,/, $host) {
        my ($err, @list) = getaddrinfo($addr, $port, { socktype => SOCK_STREAM, flags => AI_NUMERICHOST });
        die "$addr: $err\n" if $err;
        push @infos, @list;
    }
    my $s = IO::Socket::IP->new(PeerAddrInfo => \@infos) or die "$host: $@\n";
    my @seen = ($s->peerhost, $s->peerport, $s->sockhost, $s->sockport);
    my $data = pack 'N*', map { int rand 2**32 } 1 .. 37500;
    $data .= '.';
    my $got = '';
    my $pid = fork // die "fork: $!\n";
    if (!$pid) {
        print $s $data or die "print: $!\n";
        $s->shutdown(SHUT_WR);
        exit 0;
    }
    while (sysread $s, my $piece, 65536) { $got .= $piece }
    waitpid $pid, 0;
    $s->close;
    printf qq({"to": "%s", "peer": "%s", "peer_port": %d, "own": "%s", "own_port": %d, "sent": %d, "got": %d, "same": %s}\n),
        $host, @seen, length $data, length $got, $got eq $data ? 'true' : 'false';
}
