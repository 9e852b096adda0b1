package main

import (
	"bytes"
	"context"
	"encoding/gob"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/pillion-project/pillion/bpf"
	"github.com/pillion-project/pillion/cmd/pillion/handover"
	"github.com/pillion-project/pillion/redirect/l4"
	"golang.org/x/sys/unix"
)

// This file is about a restart by systemd. The process that ends puts everything that
// a taker would get into systemd's store of descriptors, as one socket in which it
// waits to be read; the next process finds it there, and takes it over
// (FileDescriptorStoreMax= in systemd.service(5), sd_pid_notify_with_fds(3)).

const (
	// storeName is what the socket is called in the store.
	storeName = "pillion"
	// askLimit is how long systemd may take to answer.
	askLimit = 3 * time.Second
	// firstStored is the first of the descriptors that systemd starts a process with
	// (SD_LISTEN_FDS_START).
	firstStored = 3
)

// keepForRestart puts the instance into systemd's store, if that ends this process in
// order to start another one. It tells whether the instance is there: then it is no
// longer this process's.
func (i *instance) keepForRestart(ctx context.Context, f *runFlags) bool {
	ctx, cancel := context.WithTimeout(ctx, askLimit)
	defer cancel()
	unit, err := i.restarting(ctx)
	if err != nil {
		i.log.Warn("cannot ask systemd whether this is a restart: taking it for the end", "error", err)
		return false
	}
	if unit == "" {
		return false
	}
	if _, err := f.configuration(); err != nil {
		// Nobody would come for what is kept. To drain is kinder.
		i.log.Error("the next process will not start: taking this for the end", "error", err)
		return false
	}
	n, err := i.store(ctx, unit)
	if err != nil {
		i.log.Error("connections are not kept over the restart", "error", err)
		return false
	}
	i.log.Info("kept for the next process", "instance", i.name, "connections", n)
	return true
}

// restarting returns the unit of this process if systemd is restarting that, and a
// descriptor can be stored.
func (i *instance) restarting(ctx context.Context) (unit string, err error) {
	own, err := ownCgroup(i.cgroups)
	if err != nil {
		return "", err
	}
	unit = filepath.Base(own)
	// A pattern would take a dash's \x2d for something else.
	jobs, err := systemctl(ctx, "list-jobs", "--full", "--plain", "--no-legend")
	if err != nil {
		return "", err
	}
	if !restarts(jobs, unit) {
		return "", nil
	}
	most, err := systemctl(ctx, "show", "--value", "-p", "FileDescriptorStoreMax", unit)
	if err == nil && (most == "" || most == "0") {
		err = fmt.Errorf("%s has no FileDescriptorStoreMax", unit)
	}
	return unit, err
}

// restarts tells whether a list of systemd's jobs has one that restarts the unit.
func restarts(jobs, unit string) bool {
	for line := range strings.Lines(jobs) {
		// Its number, unit, type and state.
		if w := strings.Fields(line); len(w) >= 3 && w[1] == unit {
			return w[2] == "restart"
		}
	}
	return false
}

// systemctl asks systemd. A second time, since the signal that this process got may go
// to all of the unit (KillMode=control-group), and so to the first one.
func systemctl(ctx context.Context, args ...string) (string, error) {
	var err error
	for range 2 {
		cmd := exec.CommandContext(ctx, "systemctl", args...)
		cmd.Env = append(os.Environ(), "LC_ALL=C", "SYSTEMD_PAGER=")
		var out []byte
		if out, err = cmd.Output(); err == nil {
			return strings.TrimSpace(string(out)), nil
		}
	}
	return "", fmt.Errorf("systemctl %s: %w", args[0], err)
}

// store writes everything into a socket, and gives that to systemd. When it fails,
// this process goes on with the instance.
func (i *instance) store(ctx context.Context, unit string) (connections int, err error) {
	settling, cancel := context.WithTimeout(ctx, settleLimit)
	err = i.datapath.Settled(settling)
	cancel()
	if err != nil {
		return 0, fmt.Errorf("this process is moving the maps itself: %w", err)
	}
	i.giving.Lock()
	defer i.giving.Unlock()
	if i.gone.Load() {
		return 0, errHandedOver
	}
	hello := handover.Hello{
		Protocol: handover.Protocol, ABI: bpf.ABI, Moves: true, Carry: l4.CarryVersion,
		Build: buildVersion(), Instance: i.name, Pid: os.Getpid(),
	}
	if err := i.suits(&hello); err != nil {
		return 0, err
	}
	conn, other, err := handover.Pair()
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	defer other.Close()
	conn.Within(restLimit)
	if err := conn.SendJSON(handover.KindHello, hello, nil); err != nil {
		return 0, err
	}
	if err := i.welcome(conn); err != nil {
		return 0, err
	}
	still, err := i.comeToRest(ctx)
	if err != nil {
		return 0, err
	}
	n, err := i.giveState(conn, still)
	if err == nil {
		err = conn.Send(handover.KindCommit, nil, nil)
	}
	if err == nil {
		err = intoStore(ctx, unit, other)
	}
	if err != nil {
		still.goOn()
		return 0, err
	}
	history, err := still.leave()
	if err != nil {
		i.log.Error("not all of what was kept could be let go of", "error", err)
	}
	var b bytes.Buffer
	if err := gob.NewEncoder(&b).Encode(farewell{History: history}); err == nil {
		_ = conn.Send(handover.KindFarewell, b.Bytes(), nil)
	}
	return n, nil
}

// intoStore gives a descriptor to systemd, and makes sure that it is there: it says
// nothing to one that it does not keep.
func intoStore(ctx context.Context, unit string, f *os.File) (err error) {
	empty := func() { _ = notify("FDSTOREREMOVE=1\nFDNAME=" + storeName) }
	empty()
	defer func() {
		if err != nil {
			empty() // it may be there all the same, late: this process goes on with the instance
		}
	}()
	// It is not to be dropped because this end of it is closed.
	if err := notifyWith("FDSTORE=1\nFDPOLL=0\nFDNAME="+storeName, int(f.Fd())); err != nil {
		return err
	}
	if err := notifyBarrier(askLimit); err != nil {
		return err
	}
	n, err := systemctl(ctx, "show", "--value", "-p", "NFileDescriptorStore", unit)
	if err == nil && n != "0" {
		return nil
	}
	return errors.Join(err, fmt.Errorf("systemd has not stored the descriptor of %s", unit))
}

// takeStored finds what the process before this one has put into systemd's store. It
// returns nil when there is nothing, or nothing that is of use: then this is a start
// as any other.
func takeStored(p *plan) *taking {
	s := p.global.survival
	fd, ok := stored(s.mainPID(), s.revived())
	if !ok {
		return nil
	}
	// It is read once, whatever comes of it.
	_ = notify("FDSTOREREMOVE=1\nFDNAME=" + storeName)
	conn, err := handover.Open(fd)
	if err != nil {
		p.log.Error("what the earlier process kept is lost", "error", err)
		return nil
	}
	s.noteTaking(nil, l4.TakingBegun)
	t := &taking{conn: conn, sockets: map[string]net.Listener{}}
	if err := t.unpack(p.name); err != nil {
		t.close()
		s.noteTaking(nil, l4.TakingNothing)
		p.log.Error("what the earlier process kept is lost", "error", err)
		return nil
	}
	p.log.Info("going on with what an earlier process kept", "instance", p.name, "pid", t.welcome.Pid, "version", t.welcome.Build)
	return t
}

// unpack reads who wrote it, and what is prepared with.
func (t *taking) unpack(name string) error {
	t.conn.Within(helloLimit)
	f, err := t.conn.Expect(handover.KindHello)
	if err != nil {
		return err
	}
	f.Close()
	var hello handover.Hello
	if err := json.Unmarshal(f.Data, &hello); err != nil {
		return fmt.Errorf("its first word is not understood: %w", err)
	}
	switch {
	case hello.Protocol != handover.Protocol || hello.ABI != bpf.ABI && !hello.Moves || hello.Carry != l4.CarryVersion:
		return fmt.Errorf("it is of another version (%s): protocol %d, maps %d, connections %d; this is %d, %d, %d",
			hello.Build, hello.Protocol, hello.ABI, hello.Carry, handover.Protocol, bpf.ABI, l4.CarryVersion)
	case hello.Instance != name:
		return fmt.Errorf("it is of instance %q, this is %q", hello.Instance, name)
	}
	return t.welcomed()
}

// stored returns the descriptor that the store has for the process that systemd started,
// main. Others that systemd gives it are closed: it has no use for any. again tells
// that an earlier worker of a keeper has had them all.
func stored(main int, again bool) (fd int, ok bool) {
	pid, fds, names := os.Getenv("LISTEN_PID"), os.Getenv("LISTEN_FDS"), os.Getenv("LISTEN_FDNAMES")
	for _, name := range []string{"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"} {
		os.Unsetenv(name) // they are not for children
	}
	n, err := strconv.Atoi(fds)
	if err != nil || n < 1 || pid != strconv.Itoa(main) || again {
		return -1, false
	}
	at := slices.Index(strings.Split(names, ":"), storeName)
	for k := range n {
		if k == at {
			unix.CloseOnExec(firstStored + k)
		} else {
			unix.Close(firstStored + k)
		}
	}
	return firstStored + at, at >= 0 && at < n
}
