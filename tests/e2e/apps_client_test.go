package e2e

// goApps are the applications written in Go.
func goApps() map[string]func(args []string) error {
	return map[string]func(args []string) error{
		"dial": dialApp,
	}
}
