// Connections as Java makes them: [METHOD HOST PORT]..., blocking or nio. Java's
// sockets are IPv6 sockets, to IPv4 destinations too. Bytes are echoed over each
// connection; what it saw is a line of JSON.

import java.io.IOException;
import java.net.InetSocketAddress;
import java.net.Socket;
import java.net.SocketAddress;
import java.nio.ByteBuffer;
import java.nio.channels.SelectionKey;
import java.nio.channels.Selector;
import java.nio.channels.SocketChannel;
import java.util.Arrays;
import java.util.Random;

public class Client {
    static final int SIZE = 150001;

    public static void main(String[] args) throws Exception {
        for (int i = 0; i < args.length; i += 3) {
            byte[] data = new byte[SIZE];
            new Random().nextBytes(data);
            InetSocketAddress to = new InetSocketAddress(args[i + 1], Integer.parseInt(args[i + 2]));
            if (args[i].equals("blocking")) {
                blocking(to, data);
            } else {
                selected(to, data);
            }
        }
    }

    static void blocking(InetSocketAddress to, byte[] data) throws Exception {
        try (Socket s = new Socket()) {
            s.setSoTimeout(20000);
            s.connect(to, 20000);
            SocketAddress peer = s.getRemoteSocketAddress();
            SocketAddress own = s.getLocalSocketAddress();
            Thread writer = new Thread(() -> {
                try {
                    s.getOutputStream().write(data);
                    s.shutdownOutput();
                } catch (IOException e) {
                    e.printStackTrace();
                }
            });
            writer.start();
            byte[] got = s.getInputStream().readAllBytes();
            writer.join();
            tell(to, peer, own, data, got);
        }
    }

    static void selected(InetSocketAddress to, byte[] data) throws Exception {
        ByteBuffer out = ByteBuffer.wrap(data);
        ByteBuffer in = ByteBuffer.allocate(SIZE + 1);
        SocketAddress peer = null;
        SocketAddress own = null;
        try (Selector selector = Selector.open(); SocketChannel c = SocketChannel.open()) {
            c.configureBlocking(false);
            SelectionKey k = c.register(selector, SelectionKey.OP_CONNECT);
            if (c.connect(to)) {
                throw new IOException("connected at once");
            }
            boolean open = true;
            while (open) {
                if (selector.select(20000) == 0) {
                    throw new IOException("nothing happens");
                }
                selector.selectedKeys().clear();
                if (k.isConnectable() && c.finishConnect()) {
                    peer = c.getRemoteAddress();
                    own = c.getLocalAddress();
                    k.interestOps(SelectionKey.OP_READ | SelectionKey.OP_WRITE);
                }
                if (k.isWritable()) {
                    c.write(out);
                    if (!out.hasRemaining()) {
                        c.shutdownOutput();
                        k.interestOps(SelectionKey.OP_READ);
                    }
                }
                open = !k.isReadable() || c.read(in) >= 0;
            }
        }
        tell(to, peer, own, data, Arrays.copyOf(in.array(), in.position()));
    }

    static void tell(InetSocketAddress to, SocketAddress peer, SocketAddress own, byte[] data, byte[] got) {
        InetSocketAddress p = (InetSocketAddress) peer;
        InetSocketAddress o = (InetSocketAddress) own;
        System.out.printf("{\"to\": \"%s\", \"peer\": \"%s\", \"peer_port\": %d, \"own\": \"%s\", \"own_port\": %d, "
                + "\"sent\": %d, \"got\": %d, \"same\": %b}%n", to.getAddress().getHostAddress(), p.getAddress().getHostAddress(),
                p.getPort(), o.getAddress().getHostAddress(), o.getPort(), data.length, got.length, Arrays.equals(data, got));
    }
}
