// Command app is what stands in the pods of tests: an application that knows
// nothing of Pillion, or a server.
//
// A server tells its name in a line, and answers each further line with itself.
package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"time"
)

const patience = 10 * time.Second // for an answer

func main() {
	// Before anything else: whatever comes later would be no first connect.
	if len(os.Args) > 3 && os.Args[1] == "work" && os.Args[2] == "-first" {
		first = ask(os.Args[3])
	}
	ended := make(chan os.Signal, 1)
	signal.Notify(ended, syscall.SIGTERM, syscall.SIGINT)
	command := ""
	if len(os.Args) > 1 {
		command = os.Args[1]
	}
	switch command {
	case "work":
		os.Exit(work(os.Args[2:], ended))
	case "serve":
		os.Exit(serve(os.Args[2:], ended))
	default:
		fmt.Fprintln(os.Stderr, "usage: app work|serve")
		os.Exit(2)
	}
}

var first string // what the first connect of the process got

// report is what a worker tells over HTTP, and in a line when it ends.
type report struct {
	First string
	// Answers counts the connections of -tick by what answered, or by errno.
	Answers map[string]int
	// Held is how many lines went to and fro on the connection of -hold, and
	// Broken how often it broke. HeldBy is what it is connected to.
	Held, Broken int
	HeldBy       string
}

// worker is an application that connects all the time.
type worker struct {
	mu sync.Mutex
	r  report
}

func work(args []string, ended <-chan os.Signal) int {
	flags := flag.NewFlagSet("work", flag.ExitOnError)
	flags.String("first", "", "address to connect to at once; has to be the first flag")
	tick := flags.String("tick", "", "address to connect to again and again")
	hold := flags.String("hold", "", "address to keep a connection to")
	bye := flags.String("bye", "", "address to tell how it was, when told to end")
	listen := flags.String("listen", ":9000", "where it reports")
	once := flags.String("once", "", "file: the first time, which is when it is not there, the work fails")
	job := flags.Bool("job", false, "end when the first answer is there, with its result")
	flags.Parse(args)
	w := &worker{r: report{First: first, Answers: map[string]int{}}}
	fmt.Printf("first: %s\n", first)
	if *job {
		return finish(first, *once)
	}
	if *tick != "" {
		go w.tick(*tick)
	}
	if *hold != "" {
		go w.hold(*hold)
	}
	go http.ListenAndServe(*listen, w)
	<-ended
	// Whoever carries connections has to be there until the end.
	time.Sleep(time.Second)
	if *bye != "" {
		b, _ := json.Marshal(w.copy())
		fmt.Println("bye:", say(*bye, "bye "+os.Getenv("POD_NAME")+" "+string(b)))
	}
	return 0
}

// finish is the end of a job.
func finish(answer, once string) int {
	if once != "" {
		if _, err := os.Stat(once); errors.Is(err, os.ErrNotExist) {
			os.WriteFile(once, nil, 0o600)
			return 3
		}
	}
	if isErrno(answer) {
		return 1
	}
	return 0
}

func isErrno(answer string) bool { return strings.HasPrefix(answer, "E") }

func (w *worker) copy() report {
	w.mu.Lock()
	defer w.mu.Unlock()
	r := w.r
	r.Answers = map[string]int{}
	for k, n := range w.r.Answers {
		r.Answers[k] = n
	}
	return r
}

// ServeHTTP reports.
func (w *worker) ServeHTTP(out http.ResponseWriter, _ *http.Request) {
	json.NewEncoder(out).Encode(w.copy())
}

func (w *worker) tick(to string) {
	for {
		answer := ask(to)
		w.mu.Lock()
		w.r.Answers[answer]++
		w.mu.Unlock()
		time.Sleep(10 * time.Millisecond)
	}
}

// hold keeps one connection, on which lines go to and fro.
func (w *worker) hold(to string) {
	for {
		c, name, err := dial(to)
		if err == nil {
			w.mu.Lock()
			w.r.HeldBy = name
			w.mu.Unlock()
			err = w.echo(c)
			c.Close()
		}
		w.mu.Lock()
		w.r.Broken++
		w.mu.Unlock()
		fmt.Println("hold:", err)
		time.Sleep(50 * time.Millisecond)
	}
}

func (w *worker) echo(c net.Conn) error {
	in := bufio.NewReader(c)
	for n := 0; ; n++ {
		want := fmt.Sprintf("line %d\n", n)
		c.SetDeadline(time.Now().Add(patience))
		if _, err := io.WriteString(c, want); err != nil {
			return err
		}
		got, err := in.ReadString('\n')
		if err != nil {
			return err
		}
		if got != want {
			return fmt.Errorf("%q came back as %q", want, got)
		}
		w.mu.Lock()
		w.r.Held++
		w.mu.Unlock()
		time.Sleep(10 * time.Millisecond)
	}
}

// dial connects, and hears the server's name.
func dial(to string) (net.Conn, string, error) {
	c, err := net.DialTimeout("tcp", to, patience)
	if err != nil {
		return nil, "", err
	}
	c.SetDeadline(time.Now().Add(patience))
	// Byte by byte: what comes behind the line is for others.
	var name []byte
	for b := make([]byte, 1); ; {
		if _, err := io.ReadFull(c, b); err != nil {
			c.Close()
			return nil, "", fmt.Errorf("read the name: %w", err)
		}
		if b[0] == '\n' {
			return c, string(name), nil
		}
		name = append(name, b[0])
	}
}

// ask connects once, and returns the server's name or the errno.
func ask(to string) string {
	c, name, err := dial(to)
	if err != nil {
		return errno(err)
	}
	c.Close()
	return name
}

// say sends a line, and returns ask's result when it came back.
func say(to, line string) string {
	c, name, err := dial(to)
	if err != nil {
		return errno(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	fmt.Fprintln(c, line)
	if _, err := bufio.NewReader(c).ReadString('\n'); err != nil {
		return errno(err)
	}
	return name
}

func errno(err error) string {
	var code syscall.Errno
	switch {
	case errors.As(err, &code):
		names := map[syscall.Errno]string{
			syscall.ECONNREFUSED: "ECONNREFUSED", syscall.ECONNRESET: "ECONNRESET", syscall.ENETUNREACH: "ENETUNREACH",
			syscall.EHOSTUNREACH: "EHOSTUNREACH", syscall.ETIMEDOUT: "ETIMEDOUT", syscall.EPERM: "EPERM",
		}
		if name := names[code]; name != "" {
			return name
		}
		return fmt.Sprintf("E%d", int(code))
	case errors.Is(err, os.ErrDeadlineExceeded):
		return "ETIMEOUT: " + err.Error()
	}
	return "E: " + err.Error()
}
