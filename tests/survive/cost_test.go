package survive

import (
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pillion-project/pillion/tests/rig"
)

// cost is how many rounds TestCost takes; none as a test.
var cost = flag.Int("cost", 0, "rounds of the comparison of survive: crash with restart")

// envCost makes this test binary the load of TestCost: its value says which.
const envCost = "PILLION_TEST_SURVIVE_COST"

// TestCost compares what the handler's process takes of the CPU with either value of
// survive, in turns. It logs, and asserts nothing: the machine is not its own.
func TestCost(t *testing.T) {
	if *cost == 0 {
		t.Skip("run with -cost")
	}
	for _, load := range []string{"messages", "connections", "bulk"} {
		var all [2][]float64
		for range *cost {
			for i, survive := range []string{"restart", "crash"} {
				all[i] = append(all[i], oneCost(t, survive, load))
			}
		}
		var ratios []float64
		for n := range all[0] {
			ratios = append(ratios, all[1][n]/all[0][n])
		}
		for _, list := range [][]float64{all[0], all[1], ratios} {
			slices.Sort(list)
		}
		mid := *cost / 2
		t.Logf("%s: us of CPU for each: restart %.2f, crash %.2f; ratio %.3f (%.3f to %.3f)",
			load, all[0][mid], all[1][mid], ratios[mid], ratios[0], ratios[len(ratios)-1])
	}
}

// oneCost returns the CPU time for one unit of work, in us.
func oneCost(t *testing.T, survive, load string) (us float64) {
	t.Run(survive+" "+load, func(t *testing.T) {
		r := rig.New(t)
		r.Serve(t, ends[0], echoOrTake)
		s := &stage{Rig: r}
		s.Instance = s.Run(t, fmt.Sprintf("survive: %s\nconnect: early\nservices:\n  - name: s\n    address: %q\n    endpoints: [%q]\nflow_log: %q\n",
			survive, vip, ends[0], filepath.Join(t.TempDir(), "flows")))
		pid := s.Cmd.Process.Pid
		if survive == "crash" {
			pid = s.worker()
		}
		cmd := r.Command(os.Args[0], "-test.run=^TestLoad$")
		cmd.Env = append(os.Environ(), envCost+"="+load)
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		before := cpu(t, pid)
		if err := r.Start(cmd); err != nil {
			t.Fatal(err)
		}
		var units float64
		if err := json.NewDecoder(out).Decode(&units); err != nil {
			t.Fatal(err)
		}
		us = float64((cpu(t, pid) - before).Microseconds()) / units
		cmd.Wait()
	})
	return us
}

// cpu is what the threads of a process have run, to the nanosecond.
func cpu(t *testing.T, pid int) (sum time.Duration) {
	t.Helper()
	files, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid))
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil {
			continue // it has ended
		}
		n, err := strconv.ParseInt(strings.Fields(string(text))[0], 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		sum += time.Duration(n)
	}
	return sum
}

// echoOrTake answers messages of 64 bytes, and takes what is longer.
func echoOrTake(c net.Conn) {
	buf := make([]byte, 1<<20)
	for {
		n, err := c.Read(buf)
		if err != nil {
			return
		}
		if n <= 64 {
			if _, err := c.Write(buf[:n]); err != nil {
				return
			}
		}
	}
}

// TestLoad is the application of TestCost. As a test it does nothing.
func TestLoad(*testing.T) {
	load := os.Getenv(envCost)
	if load == "" {
		return
	}
	var units float64
	var mu sync.Mutex
	var all sync.WaitGroup
	workers := map[string]int{"messages": 16, "connections": 8, "bulk": 2}[load]
	end := time.Now().Add(2 * time.Second)
	for range workers {
		all.Go(func() {
			n := work(load, end)
			mu.Lock()
			defer mu.Unlock()
			units += n
		})
	}
	all.Wait()
	json.NewEncoder(os.Stdout).Encode(units)
	os.Exit(0)
}

// work returns how many round trips, connections or GiB there were.
func work(load string, end time.Time) (n float64) {
	message, bulk := make([]byte, 64), make([]byte, 1<<20)
	for first := true; first || load == "connections" && time.Now().Before(end); first = false {
		c, err := net.Dial("tcp", vip.String())
		if err != nil {
			panic(err)
		}
		for time.Now().Before(end) {
			if load == "bulk" {
				if _, err := c.Write(bulk); err != nil {
					panic(err)
				}
				n += 1. / 1024
				continue
			}
			if _, err := c.Write(message); err != nil {
				panic(err)
			}
			if _, err := io.ReadFull(c, message); err != nil {
				panic(err)
			}
			n++
			if load == "connections" {
				break
			}
		}
		c.Close()
	}
	return n
}
