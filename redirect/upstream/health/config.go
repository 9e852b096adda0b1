package health

import (
	"errors"
	"fmt"
	"time"
)

// Config says when an endpoint is ejected and how it returns. The zero value
// never ejects.
type Config struct {
	// Failures is how many dials in a row must fail; 0 never ejects.
	Failures int
	// Base is the first wait, Max the longest one.
	Base, Max time.Duration
	// Panic is a share in percent: while fewer of a group's endpoints that are
	// not down are available, its ejections are ignored. 0 never ignores them.
	Panic int
}

// Default returns the configuration that applies where the user gives none.
//
// Three failures, since one is a listener that restarts and two are the race of
// two workers into that same restart, while a dead endpoint reaches three
// within a round or two of the balancer and its failures cost the application
// nothing but a retry.
func Default() Config {
	return Config{Failures: 3, Base: time.Second, Max: 30 * time.Second, Panic: 50}
}

// Validate reports every value that makes no sense, in one error.
func (c Config) Validate() error {
	var errs []error
	if c.Failures < 0 {
		errs = append(errs, fmt.Errorf("failures %d is negative", c.Failures))
	}
	if c.Panic < 0 || c.Panic > 100 {
		errs = append(errs, fmt.Errorf("panic %d is no percentage", c.Panic))
	}
	if c.Failures > 0 && c.Base <= 0 {
		errs = append(errs, fmt.Errorf("base wait %s is not positive", c.Base))
	}
	if c.Failures > 0 && c.Max < c.Base {
		errs = append(errs, fmt.Errorf("longest wait %s is shorter than the base wait %s", c.Max, c.Base))
	}
	if c.Failures > 0 && c.Max > maxWait {
		errs = append(errs, fmt.Errorf("longest wait %s is longer than %s", c.Max, maxWait))
	}
	return errors.Join(errs...)
}

// maxWait is less than the kernel side has room for: 32 bits of milliseconds.
const maxWait = 1000 * time.Hour

// wait returns how long the given round of an ejection lasts: Base, doubled
// every round up to Max, less a random part of up to a quarter so that
// endpoints that died together do not return together. Rounds count from 1.
func (c Config) wait(round uint32, random uint64) time.Duration {
	d := c.Base
	for ; round > 1 && d < c.Max; round-- {
		// Near the end of the range twice the wait would overflow.
		if d > c.Max/2 {
			d = c.Max
		} else {
			d *= 2
		}
	}
	return d - time.Duration(random%uint64(d/4+1))
}
