package main

import (
	"bytes"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func plainLog(w io.Writer) slog.Handler { return slog.NewTextHandler(w, nil) }

// TestLogFile has nobody read for a while. What is written meanwhile is lost, in whole
// lines, and how much that is stands there afterwards.
func TestLogFile(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	const size = 8192
	if _, err := unix.FcntlInt(w.Fd(), unix.F_SETPIPE_SZ, size); err != nil {
		t.Fatal(err)
	}
	l := newLogFile(int(w.Fd()), plainLog)
	const lines = 500
	began := time.Now()
	for n := range lines {
		if _, err := fmt.Fprintf(l, "line %d %s\n", n, strings.Repeat("x", n*10)); err != nil { // up to 5 kB
			t.Fatal(err)
		}
	}
	if took := time.Since(began); took > lines*logPatience/10 {
		t.Errorf("%d lines that nobody read took %v", lines, took)
	}
	done := make(chan []byte)
	go func() {
		all, _ := io.ReadAll(r)
		done <- all
	}()
	// The first may come before the reader.
	for n := 0; l.lost > 0 || n == 0; n++ {
		fmt.Fprintf(l, "again %d\n", n)
		time.Sleep(time.Millisecond)
	}
	fmt.Fprintln(l, "the last")
	w.Close()
	all := <-done
	if !bytes.HasSuffix(all, []byte("\nthe last\n")) || !bytes.Contains(all, []byte("\ntime=")) || !bytes.Contains(all, []byte("lines are lost")) {
		t.Errorf("%.3000s", all)
	}
	// Of lines that were begun, the next ones are apart.
	for line := range strings.Lines(string(all)) {
		if strings.Count(line, "line ")+strings.Count(line, "again ")+strings.Count(line, "time=") > 1 {
			t.Errorf("two lines in one: %q", line)
		}
	}
}

// TestLogFileGone has the reader go away. It must not end this process, nor hold it up.
func TestLogFileGone(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	r.Close()
	l := newLogFile(int(w.Fd()), plainLog)
	if n, err := fmt.Fprintln(l, "a line"); n != 7 || err != nil {
		t.Errorf("%d, %v", n, err)
	}
}
