package l4

import (
	"sync/atomic"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// pipeSize lets one splice move what is usually in a receive buffer: with
	// 64 KiB a GiB costs twice as much (docs/performance.md).
	pipeSize = 1 << 20
	// pipesMax keeps us below fs.pipe-user-pages-soft (64 MiB by default),
	// past which the kernel shrinks the pipes of everybody with our uid.
	pipesMax = 48
	// pipesKept is how many unused pipes a worker keeps.
	pipesKept = 8
)

// pipe is a pair of descriptors; its read end first.
type pipe [2]int32

var noPipe = pipe{-1, -1}

// pipes lends pipes to the connections of one worker. What it lends is empty.
type pipes struct {
	free []pipe
	open *atomic.Int32 // of all workers
}

// get returns noPipe when there is none to be had: then bytes are copied.
func (p *pipes) get() pipe {
	if n := len(p.free); n > 0 {
		got := p.free[n-1]
		p.free = p.free[:n-1]
		return got
	}
	if p.open.Add(1) > pipesMax {
		p.open.Add(-1)
		return noPipe
	}
	var got pipe
	_, _, e := syscall.RawSyscall(unix.SYS_PIPE2, uintptr(unsafe.Pointer(&got)), unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if e != 0 {
		p.open.Add(-1)
		return noPipe
	}
	// A small pipe is no better than a copy.
	_, _, e = syscall.RawSyscall(unix.SYS_FCNTL, uintptr(got[0]), unix.F_SETPIPE_SZ, pipeSize)
	if e != 0 {
		p.close(got)
		return noPipe
	}
	return got
}

// put takes a pipe back. One that holds bytes is closed with them.
func (p *pipes) put(back pipe, inPipe int) {
	if back == noPipe {
		return
	}
	if inPipe == 0 && len(p.free) < pipesKept {
		p.free = append(p.free, back)
		return
	}
	p.close(back)
}

func (p *pipes) close(c pipe) {
	sysClose(c[0])
	sysClose(c[1])
	p.open.Add(-1)
}

func (p *pipes) closeAll() {
	for _, c := range p.free {
		p.close(c)
	}
	p.free = nil
}
