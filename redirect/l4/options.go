package l4

import (
	"github.com/pillion-project/pillion/redirect/flow"
	"golang.org/x/sys/unix"
)

// mirrorTCP gives the upstream socket the application's options of TCP itself.
// None of them is worth a connection that fails.
func (w *worker) mirrorTCP(c *conn, fd int32) {
	d := &c.target.Downstream
	if k := d.KeepAlive; k.Count != 0 {
		c.kept = true
		setKeepAlive(fd, k)
	}
	if d.UserTimeout != 0 {
		sysSetInt(fd, unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(d.UserTimeout))
	}
	if d.Congestion != w.defaultCongestion(fd) && d.Congestion != [16]byte{} {
		name := d.Congestion
		sysSetString(fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION, name[:])
		c.sides[up].chosen = true
		c.keepFlag(keptChosen)
	}
}

// defaultCongestion is the algorithm of sockets for which nobody chose one: fd is
// such a socket. It is read again now and then, since a sysctl may change it.
func (w *worker) defaultCongestion(fd int32) [16]byte {
	if w.now-w.congestionRead >= int64(keepSweep) || w.congestion == [16]byte{} {
		w.congestion, w.congestionRead = sysCongestion(fd), w.now
	}
	return w.congestion
}

func setKeepAlive(fd int32, k flow.KeepAlive) {
	sysSetInt(fd, unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1)
	sysSetInt(fd, unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, int(k.Idle))
	sysSetInt(fd, unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, int(k.Interval))
	sysSetInt(fd, unix.IPPROTO_TCP, unix.TCP_KEEPCNT, int(k.Count))
}
