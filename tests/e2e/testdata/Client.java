// Many sockets at once, and HTTP, as Java makes them: an echo server on port 7, a
// site on port 8080.
// Java's sockets are IPv6 sockets, to IPv4 destinations too.

import java.io.IOException;
import java.net.InetSocketAddress;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;
import java.nio.ByteBuffer;
import java.nio.channels.SelectionKey;
import java.nio.channels.Selector;
import java.nio.channels.SocketChannel;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;

public class Client {
    static final String[] HOSTS = {"198.51.100.7", "2001:db8:7::7"};

    public static void main(String[] args) throws Exception {
        for (String host : HOSTS) {
            selected(host, 20);
        }
        web();
    }

    static byte[] data(int size, int seed) {
        byte[] b = new byte[size];
        for (int i = 0; i < size; i++) {
            b[i] = (byte) (i * 31 + i / 251 + seed);
        }
        return b;
    }

    /** One of many connections that a selector serves. */
    static class Talk {
        final ByteBuffer out;
        final ByteBuffer in;
        boolean done;

        Talk(int seed) {
            out = ByteBuffer.wrap(data(100_000 + seed * 1000, seed));
            in = ByteBuffer.allocate(out.capacity() + 1);
        }

        boolean same() {
            return in.position() == out.capacity() && Arrays.equals(Arrays.copyOf(in.array(), in.position()), out.array());
        }
    }

    static void selected(String host, int n) throws Exception {
        List<Talk> talks = new ArrayList<>();
        List<SocketChannel> channels = new ArrayList<>();
        try (Selector selector = Selector.open()) {
            for (int i = 0; i < n; i++) {
                SocketChannel c = SocketChannel.open();
                c.configureBlocking(false);
                Talk t = new Talk(i);
                talks.add(t);
                channels.add(c);
                boolean now = c.connect(new InetSocketAddress(host, 7));
                c.register(selector, now ? SelectionKey.OP_WRITE | SelectionKey.OP_READ : SelectionKey.OP_CONNECT, t);
            }
            int left = n;
            while (left > 0) {
                if (selector.select(20000) == 0) {
                    throw new IOException("nothing happens");
                }
                for (SelectionKey k : selector.selectedKeys()) {
                    left -= step(k) ? 1 : 0;
                }
                selector.selectedKeys().clear();
            }
        }
        long same = talks.stream().filter(Talk::same).count();
        SocketChannel first = channels.get(0);
        System.out.println("selected " + first.getRemoteAddress() + " "
                + ((InetSocketAddress) first.getLocalAddress()).getAddress() + " " + same);
        for (SocketChannel c : channels) {
            c.close();
        }
    }

    /** Returns whether the connection has just ended. */
    static boolean step(SelectionKey k) throws IOException {
        SocketChannel c = (SocketChannel) k.channel();
        Talk t = (Talk) k.attachment();
        if (k.isConnectable() && c.finishConnect()) {
            k.interestOps(SelectionKey.OP_READ | SelectionKey.OP_WRITE);
            return false;
        }
        if (k.isWritable()) {
            c.write(t.out);
            if (!t.out.hasRemaining()) {
                c.shutdownOutput();
                k.interestOps(SelectionKey.OP_READ);
            }
        }
        if (k.isReadable() && c.read(t.in) < 0) {
            k.cancel();
            return true;
        }
        return false;
    }

    static void web() throws Exception {
        HttpClient client = HttpClient.newBuilder().version(HttpClient.Version.HTTP_1_1).build();
        byte[] body = data(5_000_000, 3);
        int good = 0;
        for (int i = 0; i < 5; i++) {
            HttpResponse<String> r = client.send(HttpRequest.newBuilder(URI.create("http://198.51.100.7:8080/sum"))
                    .POST(HttpRequest.BodyPublishers.ofByteArray(body)).build(), HttpResponse.BodyHandlers.ofString());
            good += r.statusCode() == 200 && r.body().startsWith("POST 5000000 ") ? 1 : 0;
        }
        HttpResponse<byte[]> big = client.send(HttpRequest.newBuilder(URI.create("http://198.51.100.7:8080/big?n=20000000"))
                .build(), HttpResponse.BodyHandlers.ofByteArray());
        System.out.println("http " + good + " " + big.body().length);
    }
}
