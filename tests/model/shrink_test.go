package model

import "time"

const (
	// shrinkFor bounds how long a script is made smaller, shrinkLimit how long
	// an operation of a smaller one may take.
	shrinkFor   = time.Minute
	shrinkLimit = 2 * time.Second
)

// shrink returns the smallest script that it finds by leaving steps out, and for
// which fails is true. Barriers stay: without them the outcome would be open.
func shrink(s *script, fails func(*script) bool) *script {
	end := time.Now().Add(shrinkFor)
	for size := len(s.Steps) / 2; size > 0; size /= 2 {
		for at := len(s.Steps) - size; at >= 0 && time.Now().Before(end); at-- {
			if at+size > len(s.Steps) {
				continue
			}
			less := *s
			less.Limit = shrinkLimit
			less.Steps = append([]step(nil), s.Steps[:at]...)
			for _, st := range s.Steps[at : at+size] {
				if st.needed() {
					less.Steps = append(less.Steps, st)
				}
			}
			less.Steps = append(less.Steps, s.Steps[at+size:]...)
			if len(less.Steps) < len(s.Steps) && fails(&less) {
				s = &less
			}
		}
	}
	return s
}

// needed tells whether a step cannot be left out alone.
func (s step) needed() bool {
	for _, o := range s.Ops {
		if o != nil && o.Kind >= opArrived {
			return true
		}
	}
	return false
}
