package e2e

import (
	"bufio"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// goApps are the applications written in Go, by what they do.
func goApps() map[string]func(args []string) error {
	return map[string]func(args []string) error{
		"dial":     dialApp,
		"short":    shortApp,
		"bulk":     bulkApp,
		"crowd":    crowdApp,
		"requests": requestsApp,
	}
}

// dialLimit is how long a connection may take to be established, and to speak.
const dialLimit = 30 * time.Second

// shortApp makes many short connections to addresses in turn: COUNT WORKERS
// ADDRESS... It expects the server to say which address it is.
func shortApp(args []string) error {
	count, err := strconv.Atoi(args[0])
	if err != nil {
		return err
	}
	workers, err := strconv.Atoi(args[1])
	if err != nil {
		return err
	}
	targets := args[2:]
	var next, right, wrong, failed atomic.Int64
	var first sync.Once
	var all sync.WaitGroup
	for range workers {
		all.Go(func() {
			for n := next.Add(1); n <= int64(count); n = next.Add(1) {
				to := targets[int(n)%len(targets)]
				answer, peer, err := listenTo(to)
				switch {
				case err != nil:
					failed.Add(1)
					first.Do(func() { fmt.Fprintf(os.Stderr, "connection %d to %s: %v\n", n, to, err) })
				case answer != to || peer != to:
					wrong.Add(1)
					first.Do(func() { fmt.Fprintf(os.Stderr, "connection %d to %s: %s, peer %s\n", n, to, answer, peer) })
				default:
					right.Add(1)
				}
			}
		})
	}
	all.Wait()
	fmt.Printf("right %d wrong %d failed %d\n", right.Load(), wrong.Load(), failed.Load())
	return nil
}

// listenTo returns what a server says until it ends the connection.
func listenTo(to string) (answer, peer string, err error) {
	c, err := net.DialTimeout("tcp", to, dialLimit)
	if err != nil {
		return "", "", err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(dialLimit)); err != nil {
		return "", "", err
	}
	text, err := io.ReadAll(c)
	return string(text), c.RemoteAddr().String(), err
}

// bulkApp sends bytes and reads bytes, both at once, to ADDRESS, BYTES each way.
// It prints the hashes of what it sent and of what it got.
func bulkApp(args []string) error {
	size, err := strconv.ParseInt(args[1], 10, 64)
	if err != nil {
		return err
	}
	c, err := net.DialTimeout("tcp", args[0], dialLimit)
	if err != nil {
		return err
	}
	defer c.Close()
	type half struct {
		sum string
		err error
	}
	up := make(chan half, 1)
	go func() {
		sum, err := sendHashed(c, size)
		up <- half{sum, errors.Join(err, c.(*net.TCPConn).CloseWrite())}
	}()
	got, n, err := readHashed(c)
	sent := <-up
	if err := errors.Join(err, sent.err); err != nil {
		return err
	}
	fmt.Printf("%s %s %d\n", sent.sum, got, n)
	return nil
}

// sendHashed writes bytes that look random, and returns their hash.
func sendHashed(c io.Writer, size int64) (string, error) {
	h := sha256.New()
	_, err := io.CopyBuffer(struct{ io.Writer }{c}, io.TeeReader(randomBytes(size), h), make([]byte, 256<<10))
	return hex.EncodeToString(h.Sum(nil)), err
}

// readHashed reads to the end, and returns the hash.
func readHashed(c io.Reader) (string, int64, error) {
	h := sha256.New()
	n, err := io.CopyBuffer(h, struct{ io.Reader }{c}, make([]byte, 256<<10))
	return hex.EncodeToString(h.Sum(nil)), n, err
}

// crowdApp opens COUNT connections to ADDRESS..., in turn, says "open", waits for
// a line, and then uses all of them against a server that echoes.
func crowdApp(args []string) error {
	count, err := strconv.Atoi(args[0])
	if err != nil {
		return err
	}
	conns := make([]net.Conn, count)
	if err := crowd(conns, func(i int) (err error) {
		conns[i], err = net.DialTimeout("tcp", args[1+i%(len(args)-1)], dialLimit)
		return err
	}); err != nil {
		return err
	}
	fmt.Println("open")
	if _, err := bufio.NewReader(os.Stdin).ReadString('\n'); err != nil {
		return err
	}
	if err := crowd(conns, func(i int) error { return converse(conns[i], i) }); err != nil {
		return err
	}
	fmt.Println("used", count)
	return crowd(conns, func(i int) error { return conns[i].Close() })
}

// crowd calls f for each connection, some at once.
func crowd(conns []net.Conn, f func(i int) error) error {
	var next atomic.Int64
	errs := make([]error, len(conns))
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			for n := next.Add(1); n <= int64(len(conns)); n = next.Add(1) {
				errs[n-1] = f(int(n - 1))
			}
		})
	}
	all.Wait()
	return errors.Join(errs...)
}

// converse has a connection's own line echoed, which no other has.
func converse(c net.Conn, i int) error {
	if err := c.SetDeadline(time.Now().Add(dialLimit)); err != nil {
		return err
	}
	line := strings.Repeat(fmt.Sprintf("connection %d ", i), 50)
	if _, err := io.WriteString(c, line); err != nil {
		return err
	}
	got := make([]byte, len(line))
	if _, err := io.ReadFull(c, got); err != nil {
		return err
	}
	if string(got) != line {
		return fmt.Errorf("connection %d heard %q", i, got)
	}
	return nil
}

// request is the outcome of one request. Times are CLOCK_MONOTONIC, in ns.
type request struct {
	From, To    int64
	Answer, Err string
}

// requestsApp makes COUNT requests of one connection each to ADDRESS, by WORKERS
// with a PAUSE between two, and writes the outcome of each as a line of JSON.
func requestsApp(args []string) error {
	count, err := strconv.Atoi(args[0])
	if err != nil {
		return err
	}
	workers, err := strconv.Atoi(args[1])
	if err != nil {
		return err
	}
	wait, err := time.ParseDuration(args[2])
	if err != nil {
		return err
	}
	var next atomic.Int64
	var mu sync.Mutex
	out := json.NewEncoder(os.Stdout)
	var all sync.WaitGroup
	for range workers {
		all.Go(func() {
			for next.Add(1) <= int64(count) {
				q := request{From: now()}
				answer, _, err := listenTo(args[3])
				q.To, q.Answer = now(), answer
				if err != nil {
					q.Err = err.Error()
				}
				mu.Lock()
				out.Encode(&q)
				mu.Unlock()
				time.Sleep(wait)
			}
		})
	}
	all.Wait()
	return nil
}
