package main

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/pillion-project/pillion/cmd/pillion/config"
	"github.com/pillion-project/pillion/telemetry/admin"
)

// content stands for what the configuration file said; zero: it could not be read, or
// there is none.
type content [sha256.Size]byte

// told is what the log has of the refusals of one content: a reload reads again what
// the watch on the file has just read.
type told struct {
	content content
	texts   map[string]bool
}

// news tells whether the log has not said a refusal of a content yet, and takes it that
// it does now.
func (t *told) news(of content, text string) bool {
	if t.texts == nil || t.content != of {
		*t = told{content: of, texts: map[string]bool{}}
	}
	if t.texts[text] {
		return false
	}
	t.texts[text] = true
	return true
}

// taken is of the file from which the generation in force was taken.
type taken struct {
	content content
	changes []string
}

// reload reads the configuration again, at the word of by, and puts in force what can
// be taken of it.
func (c *control) reload(by string) admin.ReloadResult {
	before := c.inForce()
	text, err := c.read()
	if err != nil {
		return c.refuse(err, c.told.news(content{}, err.Error()))
	}
	next, refused, of, err := c.reread(before, text)
	if err != nil {
		return c.refuse(err, c.told.news(of, err.Error()))
	}
	for _, r := range refused {
		if c.told.news(of, r.Where+" "+r.Text) {
			c.i.log.Error("part of the configuration is refused", "name", r.Name, "at", r.Where, "kept", len(r.Kept) > 0, "error", r.Text)
		}
	}
	changes := next.Diff(before).Lines()
	next = withoutRestart(next, before)
	other := !next.Diff(before).Empty()
	if err := c.apply(next); err != nil {
		// Sources may be other ones already. If that fails, it is tried again.
		c.wake()
		return c.refuse(errors.Join(fmt.Errorf("put the configuration in force: %w", err), c.apply(before)), true)
	}
	if len(refused) == 0 {
		if err := c.i.global.survival.keepConfiguration(c.i.file, text); err != nil {
			c.i.log.Warn("the configuration is not kept for the next worker", "error", err)
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.config = next
	c.trouble = "" // all of it is in force
	c.reloads++
	c.state.Tried = time.Now()
	if other {
		c.state.Generation++
		c.state.Loaded, c.state.By = c.state.Tried, by
		c.taken = taken{of, changes}
	}
	c.state.Refused = refusals(refused)
	log := c.i.log.With("generation", c.state.Generation, "refused", len(refused))
	if len(changes) > 0 {
		log = log.With("changes", inShort(changes))
	}
	log.Info("the configuration was read")
	r := c.result()
	r.Changes, r.Earlier = changes, !other
	if r.Earlier && c.taken.content == of {
		r.Changed = c.taken.changes
	}
	return r
}

// changesLogged is how many changes the log names: there may be as many as services.
const changesLogged = 10

// inShort puts the changes that a reload makes into a line.
func inShort(changes []string) string {
	if n := len(changes); n > changesLogged {
		changes = append(slices.Clone(changes[:changesLogged]), fmt.Sprintf("and %d more", n-changesLogged))
	}
	return strings.Join(changes, "; ")
}

// result is of a reload that changed nothing. What there is no room for yet is not
// refused: status tells of it while that lasts. mu is held.
func (c *control) result() admin.ReloadResult {
	return admin.ReloadResult{
		Generation: c.state.Generation, File: c.state.File, Loaded: c.state.Loaded, By: c.state.By, Earlier: true,
		Changes: []string{}, Refused: append(slices.Clone(c.state.Refused), c.tooMany...), // never nil
	}
}

// rereadLimit is how long all other changes wait where a pipe is in the file's place.
const rereadLimit = 500 * time.Millisecond

// read returns what the file says now; nil: there is none.
func (c *control) read() ([]byte, error) {
	if c.i.file == "" {
		return nil, nil
	}
	return config.ReadWithin(c.i.file, rereadLimit)
}

// reread makes the next configuration of last and of what the file says.
func (c *control) reread(last *config.Config, text []byte) (*config.Config, []config.Refused, content, error) {
	if c.i.file == "" {
		return last, nil, content{}, nil
	}
	of := content(sha256.Sum256(text))
	next, refused, err := c.i.merge(c.i.file, text, last, c.sources.able)
	return next, refused, of, err
}

// refuse keeps what holds, and says why; in the log only if that is news.
func (c *control) refuse(err error, news bool) admin.ReloadResult {
	if news {
		c.i.log.Error("the configuration is refused, the last one stays", "error", err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.reloads++
	c.failures++
	c.state.Tried = time.Now()
	c.state.Refused = refusalsOf(err)
	return c.result()
}
