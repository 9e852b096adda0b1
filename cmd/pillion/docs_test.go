package main

import (
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/pillion-project/pillion/tests/testutil"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// TestCommandsAreDocumented holds the README's table to the commands, both ways.
func TestCommandsAreDocumented(t *testing.T) {
	_, table, found := strings.Cut(testutil.Guides(t, "../..")["README.md"], "## Commands")
	table, _, ends := strings.Cut(table, "\n\nListings")
	if !found || !ends {
		t.Fatal("the README has no table of commands")
	}
	var documented []string
	for line := range strings.Lines(table) {
		cells := strings.SplitN(line, "|", 3)
		if len(cells) < 3 {
			continue
		}
		for _, m := range regexp.MustCompile("`([a-z]+)[^`]*`").FindAllStringSubmatch(cells[1], -1) {
			documented = append(documented, m[1])
		}
	}
	for _, c := range newRoot(nil).Commands() {
		at := slices.Index(documented, c.Name())
		switch {
		case c.Name() == "help" || c.Hidden:
		case at < 0:
			t.Errorf("%s is not in the README", c.Name())
		default:
			documented = slices.Delete(documented, at, at+1)
		}
	}
	if len(documented) > 0 {
		t.Errorf("no commands, or twice in the README: %v", documented)
	}
}

// TestCommandLinesInDocs: a command line that a document shows has a command and flags
// that there are. What is to be replaced is in capitals.
func TestCommandLinesInDocs(t *testing.T) {
	shown := regexp.MustCompile("(?m)(?:^(?:    )?(?:[$#] )?(?:sudo )?|`(?:sudo )?|exec deployment/client -c pillion -- /|\\| )(?:build/)?pillion ([a-z]+)((?: [^`\n|]*)?)")
	flag := regexp.MustCompile(`(?:^|[ \[(])(--?[a-z][a-z-]*)`)
	root := newRoot(nil)
	root.InitDefaultCompletionCmd()
	lines, flags := 0, 0
	for name, text := range testutil.Guides(t, "../..") {
		for _, m := range shown.FindAllStringSubmatch(text, -1) {
			c, _, err := root.Find([]string{m[1]})
			if err != nil || c == root {
				t.Errorf("%s: %q: there is no command %s", name, m[0], m[1])
				continue
			}
			lines++
			own, _, _ := strings.Cut(m[2], " -- ") // what is behind is of another program
			own, _, _ = strings.Cut(own, " # ")
			for _, f := range flag.FindAllStringSubmatch(own, -1) {
				flags++
				if lookUp(c, f[1]) == nil {
					t.Errorf("%s: %q: %s has no flag %s", name, m[0], m[1], f[1])
				}
			}
		}
	}
	if lines < 40 || flags < 10 {
		t.Errorf("only %d command lines with %d flags were found", lines, flags)
	}
}

// lookUp returns a flag of a command, or of all; nil: there is none.
func lookUp(c *cobra.Command, text string) *pflag.Flag {
	name, long := strings.CutPrefix(text, "--")
	for _, set := range []*pflag.FlagSet{c.Flags(), c.InheritedFlags()} {
		f := set.Lookup(name)
		if !long && len(text) == 2 {
			f = set.ShorthandLookup(text[1:])
		}
		if f != nil {
			return f
		}
	}
	return nil
}

// TestFlagsInDocs: a flag that is named alone is one of some command, or of a program
// that the document is about.
func TestFlagsInDocs(t *testing.T) {
	known := make(map[string]bool)
	root := newRoot(nil)
	for _, c := range append(root.Commands(), root) {
		for _, set := range []*pflag.FlagSet{c.Flags(), c.PersistentFlags()} {
			set.VisitAll(func(f *pflag.Flag) { known["--"+f.Name] = true })
		}
	}
	// Of podman, docker, curl, and the benchmark.
	for _, f := range []string{"--cap-add", "--cgroup-parent", "--security-opt", "--interface", "--local-port", "--pipe", "--part"} {
		known[f] = true
	}
	named := 0
	for name, text := range testutil.Guides(t, "../..") {
		for _, m := range regexp.MustCompile("`(--[a-z][a-z-]*)[^`\n]*`").FindAllStringSubmatch(text, -1) {
			named++
			if !known[m[1]] {
				t.Errorf("%s: nobody has a flag %s", name, m[1])
			}
		}
	}
	if named < 10 {
		t.Errorf("only %d flags were found", named)
	}
}
