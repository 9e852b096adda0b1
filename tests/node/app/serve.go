package main

import (
	"bufio"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"
)

// serve answers until it is told to end, and goes on for the connections that
// are open then.
func serve(args []string, ended <-chan os.Signal) int {
	flags := flag.NewFlagSet("serve", flag.ExitOnError)
	listen := flags.String("listen", ":8080", "where")
	name := flags.String("name", os.Getenv("POD_NAME"), "what it calls itself")
	linger := flags.Duration("linger", 3*time.Second, "how long it goes on taking connections when it is told to end: others hear of it later")
	flags.Parse(args)
	ln, err := net.Listen("tcp", *listen)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	var open sync.WaitGroup
	go accept(ln, *name, &open)
	<-ended
	time.Sleep(*linger)
	ln.Close()
	open.Wait()
	return 0
}

func accept(ln net.Listener, name string, open *sync.WaitGroup) {
	for {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		open.Go(func() { answer(c, name) })
	}
}

// answer tells the name, and sends back what comes.
func answer(c net.Conn, name string) {
	defer c.Close()
	if _, err := io.WriteString(c, name+"\n"); err != nil {
		return
	}
	for in := bufio.NewReader(c); ; {
		line, err := in.ReadString('\n')
		if err != nil {
			return
		}
		if _, err := io.WriteString(c, line); err != nil {
			return
		}
	}
}
