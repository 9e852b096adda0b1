package testutil

import (
	"testing"
	"time"
)

// pollEvery is how long Eventually and the leak checks let pass between two
// looks. It paces the looks only: no result depends on it.
const pollEvery = 2 * time.Millisecond

// Eventually waits until done returns true, and fails the test after limit. Use
// it only for what gives no event to wait for; a limit is generous, since it is
// reached only in a failure. args describe what was waited for.
func Eventually(t testing.TB, limit time.Duration, done func() bool, args ...any) {
	t.Helper()
	if !poll(limit, done) {
		t.Fatal(append([]any{"not after", limit, ":"}, args...)...)
	}
}

// poll calls done until it returns true or limit has passed.
func poll(limit time.Duration, done func() bool) bool {
	for end := time.Now().Add(limit); ; time.Sleep(pollEvery) {
		if done() {
			return true
		}
		if time.Now().After(end) {
			return false
		}
	}
}
