// Command app is what runs in the containers beside Pillion.
//
//	app serve ADDR NAME    says NAME and its client's address to every connection
//	app ask N ADDR         connects N times, one after the other, and prints what it is told
//	app hold ADDR          prints what it is told, and then how the connection ends
//	app eat                takes memory until it is killed
//	app wait               waits to be told to end
package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Println("error:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	switch {
	case len(args) == 3 && args[0] == "serve":
		return serve(args[1], args[2])
	case len(args) == 3 && args[0] == "ask":
		return ask(args[1], args[2])
	case len(args) == 2 && args[0] == "hold":
		return hold(args[1])
	case len(args) == 1 && args[0] == "eat":
		return eat()
	case len(args) == 1 && args[0] == "wait":
		end := make(chan os.Signal, 1)
		signal.Notify(end, syscall.SIGTERM)
		<-end
		return nil
	}
	return fmt.Errorf("what is %q?", args)
}

// serve keeps each connection until the client ends it.
func serve(addr, name string) error {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go greet(c, name)
	}
}

func greet(c net.Conn, name string) {
	defer c.Close()
	host, _, _ := net.SplitHostPort(c.RemoteAddr().String())
	fmt.Fprintln(c, name, host)
	_, _ = io.Copy(io.Discard, c)
}

// ask prints, for each connection, what the server said and what the connection
// takes for its peer; or the error.
func ask(times, addr string) error {
	n, err := strconv.Atoi(times)
	if err != nil {
		return err
	}
	for range n {
		c, err := net.DialTimeout("tcp", addr, 10*time.Second)
		if err == nil {
			err = once(c)
		}
		if err != nil {
			fmt.Println("refused", errors.Is(err, syscall.ECONNREFUSED), err)
		}
	}
	return nil
}

func once(c net.Conn) error {
	defer c.Close()
	line, err := bufio.NewReader(c).ReadString('\n')
	if err != nil {
		return err
	}
	fmt.Println(strings.TrimSpace(line), c.RemoteAddr())
	return nil
}

func hold(addr string) error {
	c, err := net.Dial("tcp", addr)
	if err != nil {
		return err
	}
	defer c.Close()
	r := bufio.NewReader(c)
	line, err := r.ReadString('\n')
	if err != nil {
		return err
	}
	fmt.Println(strings.TrimSpace(line), c.RemoteAddr())
	if _, err = r.ReadByte(); errors.Is(err, syscall.ECONNRESET) {
		fmt.Println("reset")
		return nil
	}
	fmt.Println("ended:", err)
	return nil
}

func eat() error {
	var all [][]byte
	for {
		b := make([]byte, 1<<20)
		for n := 0; n < len(b); n += 4096 {
			b[n] = 1
		}
		all = append(all, b)
		if len(all) > 4096 {
			return errors.New("nobody minds")
		}
	}
}
