package events

import (
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// windowSize is how much of a ring is mapped at once, if no record is longer.
const windowSize = 256 << 10

// window reads a ring buffer map through a part of it that is mapped, and that moves
// on with what is read. All that is mapped is resident, and the library's reader maps
// all of the ring twice.
type window struct {
	conn               syscall.RawConn // of the map
	page, mask         int
	consumer, producer []byte // mapped pages
	data               []byte // mapped, from the offset from on
	from               int
	at, size           uint64 // of the record that peek returned
	busy               bool   // peek met a record that is being written
}

// openWindow maps a ring of so many bytes.
func openWindow(conn syscall.RawConn, size int) (*window, error) {
	w := &window{conn: conn, page: os.Getpagesize(), mask: size - 1}
	var err error
	if w.consumer, err = w.mmap(0, w.page, unix.PROT_READ|unix.PROT_WRITE); err != nil {
		return nil, err
	}
	if w.producer, err = w.mmap(w.page, w.page, unix.PROT_READ); err != nil {
		return nil, errors.Join(err, w.close())
	}
	return w, nil
}

func (w *window) mmap(from, size, access int) (b []byte, err error) {
	err2 := w.conn.Control(func(fd uintptr) {
		b, err = unix.Mmap(int(fd), int64(from), size, access, unix.MAP_SHARED)
	})
	if err = errors.Join(err, err2); err != nil {
		return nil, fmt.Errorf("map ring buffer: %w", err)
	}
	return b, nil
}

func (w *window) close() error {
	var errs []error
	for _, b := range []*[]byte{&w.consumer, &w.producer, &w.data} {
		if *b != nil {
			errs = append(errs, unix.Munmap(*b))
			*b = nil
		}
	}
	return errors.Join(errs...)
}

// see returns n bytes from an offset of the data on. The kernel has the data twice,
// one after the other, so nothing breaks off at the end.
func (w *window) see(offset, n int) ([]byte, error) {
	if offset < w.from || offset+n > w.from+len(w.data) {
		if w.data != nil {
			if err := unix.Munmap(w.data); err != nil {
				return nil, fmt.Errorf("unmap ring buffer: %w", err)
			}
			w.data = nil
		}
		w.from = offset &^ (w.page - 1)
		size := max(min(windowSize, w.mask+1), (offset-w.from+n+w.page-1)&^(w.page-1))
		var err error
		if w.data, err = w.mmap(2*w.page+w.from, size, unix.PROT_READ); err != nil {
			return nil, err
		}
	}
	return w.data[offset-w.from:][:n], nil
}

// peek returns the next record, which stays valid until advance, or nil if there is
// none, or none that is written: busy tells. What the kernel discarded is skipped.
func (w *window) peek() ([]byte, error) {
	if w.consumer == nil {
		return nil, os.ErrClosed
	}
	w.busy = false
	for {
		w.at = w.word(w.consumer).Load()
		if w.at >= w.word(w.producer).Load() {
			return nil, nil
		}
		offset := int(w.at) & w.mask
		b, err := w.see(offset, unix.BPF_RINGBUF_HDR_SZ)
		if err != nil {
			return nil, err
		}
		head := atomic.LoadUint32((*uint32)(unsafe.Pointer(&b[0])))
		if head&unix.BPF_RINGBUF_BUSY_BIT != 0 {
			w.busy = true
			return nil, nil
		}
		length := int(head &^ (unix.BPF_RINGBUF_BUSY_BIT | unix.BPF_RINGBUF_DISCARD_BIT))
		w.size = uint64(length+unix.BPF_RINGBUF_HDR_SZ+7) &^ 7
		if head&unix.BPF_RINGBUF_DISCARD_BIT == 0 {
			b, err := w.see(offset, unix.BPF_RINGBUF_HDR_SZ+length)
			if err != nil {
				return nil, err
			}
			return b[unix.BPF_RINGBUF_HDR_SZ:], nil
		}
		w.advance()
	}
}

// advance gives the record's room back.
func (w *window) advance() { w.word(w.consumer).Store(w.at + w.size) }

// word is the position at the beginning of a page.
func (w *window) word(page []byte) *atomic.Uint64 {
	return (*atomic.Uint64)(unsafe.Pointer(&page[0]))
}
