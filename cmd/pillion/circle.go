package main

import (
	"context"
	"errors"
	"fmt"
	"sync"
)

// circle is parts of an instance that end together.
type circle struct {
	ctx  context.Context
	stop context.CancelFunc
	die  context.CancelCauseFunc
	wg   sync.WaitGroup
}

// newCircle returns a circle whose parts outlive ctx, until its end is called.
// One that fails calls die.
func newCircle(ctx context.Context, die context.CancelCauseFunc) *circle {
	c := &circle{die: die}
	c.ctx, c.stop = context.WithCancel(context.WithoutCancel(ctx))
	return c
}

func (c *circle) run(name string, part func(context.Context) error) {
	c.wg.Go(func() {
		if err := part(c.ctx); err != nil {
			c.die(fmt.Errorf("%s: %w", name, err))
		}
	})
}

func (c *circle) end() {
	c.stop()
	c.wg.Wait()
}

// cause is why a context ended, unless it was told to in the usual way.
func cause(ctx context.Context) error {
	if err := context.Cause(ctx); !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}
