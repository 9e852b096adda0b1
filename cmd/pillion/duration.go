package main

import (
	"errors"
	"time"

	"github.com/spf13/pflag"
)

// duration is a flag's value that is not negative.
type duration time.Duration

// durationVar defines a flag that says how long something may take.
func durationVar(flags *pflag.FlagSet, to *time.Duration, name string, value time.Duration, help string) {
	*to = value
	flags.Var((*duration)(to), name, help)
}

func (d *duration) String() string { return time.Duration(*d).String() }

func (d *duration) Type() string { return "duration" }

func (d *duration) Set(text string) error {
	v, err := time.ParseDuration(text)
	if err != nil || v < 0 {
		return errors.New("want a duration that is not negative, such as 10s")
	}
	*d = duration(v)
	return nil
}
